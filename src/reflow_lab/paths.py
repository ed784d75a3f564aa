"""Where the configuration and the studies lie: in the checkout, in the installed package, or with the user."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def _shipped(name: str) -> Path:
    packaged = _PACKAGE / name
    return packaged if packaged.is_dir() else _PACKAGE.parents[1] / name


def conf_dir() -> Path:
    """The package's own configuration: reflow_lab/conf of a wheel, else the checkout's conf/ (an editable installation)."""
    return _shipped("conf")


def user_conf_dir() -> Path | None:
    """./conf of the working folder, where a user's own group members lie; None where it is missing or a checkout's own."""
    conf = Path.cwd() / "conf"
    is_checkout = (Path.cwd() / "src" / "reflow_lab").is_dir()
    return conf if conf.is_dir() and not is_checkout else None


def experiments_dirs() -> list[Path]:
    """The folders that hold studies: the user's ./experiments first, then the package's."""
    candidates = (Path.cwd() / "experiments", _shipped("experiments"))
    return list(dict.fromkeys(folder.resolve() for folder in candidates if folder.is_dir()))
