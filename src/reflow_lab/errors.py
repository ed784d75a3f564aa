"""What a user can get wrong, said in one line."""


class UserError(Exception):
    """A mistake in a command, a configuration or a file: the command line prints it without a traceback, status 2."""

    status = 2


class JobsFailed(UserError):
    """Some jobs of a study or a sweep could not be done; what the others made stays. Status 1."""

    status = 1


def bad_value(key: str, value: object, allowed: str) -> UserError:
    """An error that names the key, the bad value and what is allowed."""
    return UserError(f"{key}={value}: {allowed}")


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise `bad_value(key, value, allowed)` unless the condition holds."""
    if not condition:
        raise bad_value(key, value, allowed)
