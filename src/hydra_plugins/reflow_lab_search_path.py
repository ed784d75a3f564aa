"""Lets Hydra find a user's own group members in ./conf (Hydra discovers plug-ins in the namespace hydra_plugins only)."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from reflow_lab.paths import conf_dir, user_conf_dir


class UserConf(SearchPathPlugin):
    """Appends ./conf to reflow_lab's search path: it adds members, and cannot shadow the package's by accident."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Hydra loads every plug-in into every Hydra application, so another application's search path is left alone."""
        is_ours = any(entry.provider == "main" and entry.path == str(conf_dir()) for entry in search_path.get_path())
        user_conf = user_conf_dir()
        if is_ours and user_conf is not None:
            search_path.append("user", f"file://{user_conf}")
