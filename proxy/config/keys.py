"""F1 config.keys: where an upstream's key comes from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from proxy.config.addresses import regular_file
from proxy.config.values import key

_logger = logging.getLogger("sluice.config")


class KeySource:
    """A key that stays as it is; asked for each attempt."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def value(self) -> str:
        return self._key


class KeyFile(KeySource):
    """A key in a file, read again when the file changes.

    While the file is unreadable or blank the last good key stays in use: a rotation that passes
    through such a moment must not fail requests. Such a change is logged, and so is its end.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(_read(path))
        self._path = path
        self._seen: tuple[int, ...] = ()
        self._trouble = ""

    def value(self) -> str:
        trouble = ""
        try:
            status = self._path.stat()  # before reading: a change in between is seen the next time
            seen = status.st_mtime_ns, status.st_size, status.st_ino
            if seen != self._seen:
                self._key, self._seen = _read(self._path), seen
        except OSError as error:
            trouble = f"cannot be read: {error.strerror}"
        except ValueError as error:
            trouble = str(error)
        if bool(trouble) != bool(self._trouble):
            event = "key_file_unusable" if trouble else "key_file_usable_again"
            fields = {"path": str(self._path), "problem": trouble or None}
            _logger.warning(event, extra={"fields": fields})
        self._trouble = trouble
        return self._key


def _read(path: Path) -> str:
    """The key in a file, without the white space around it. ValueError: there is none."""
    try:
        return key(path.read_text("utf-8").strip())
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError("must be a text file with nothing but a key") from None
    except ValueError as error:
        raise ValueError(f"the key in it {error}") from None


def _with_a_key(path: Path) -> Path:
    _read(path)
    return path


KeyPath = Annotated[Path, AfterValidator(regular_file), AfterValidator(_with_a_key)]
