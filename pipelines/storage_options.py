"""Options of file systems, by the name of the place where they are kept: only that name is ever recorded."""

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

NAMED = r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:.+\.(json|toml)|block:[a-z0-9-]+)$"
"""What a name looks like."""


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """Options by URL prefix, of which the longest that matches counts. They may be secrets: none is in its repr.

    `name` says where they came from, None for nowhere: then the backends read the environment by themselves.
    """

    name: str | None = None
    _table: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # (prefix, JSON), the longest prefix first

    @classmethod
    def parse(cls, name: str, content: object) -> Self:
        """Options from a table such as {"s3://": {"endpoint_url": ...}}, or from its JSON text.

        Raises:
            ValueError: it is no such table. Says where, and nothing of what is in it.
        """
        if isinstance(content, str | bytes):
            try:
                content = json.loads(content)
            except ValueError as error:
                raise ValueError(f"storage {name} is not JSON: {_place(error)}") from None
        if not isinstance(content, Mapping):
            raise ValueError(
                f'storage {name}: a table of URL prefixes is needed, such as {{"s3://": {{"anon": true}}}}'
            )
        for prefix, options in content.items():
            if "://" not in str(prefix):
                raise ValueError(
                    f"storage {name}: an entry's name is no URL prefix: it should be like s3:// or s3://bucket"
                )
            if not isinstance(options, Mapping):
                raise ValueError(f"storage {name}: {prefix} needs a table of options")
        try:
            table = [(str(prefix), json.dumps(options)) for prefix, options in content.items()]
        except TypeError:
            raise ValueError(f"storage {name}: options are text, numbers, true, false, lists and tables") from None
        return cls(name, tuple(sorted(table, key=lambda item: -len(item[0]))))

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The URL prefixes that there are options for, the longest first."""
        return tuple(prefix for prefix, _ in self._table)

    def of(self, url: str) -> dict[str, Any]:
        """The options for `url`."""
        for prefix, options in self._table:
            if url.startswith(prefix) and (prefix.endswith("/") or url[len(prefix) :][:1] in {"", "/"}):
                return dict(json.loads(options))
        return {}


def load(name: str | None) -> StorageOptions:
    """The options kept at `env:VARIABLE` (JSON) or `file:PATH` (.json or .toml); none for None.

    Raises:
        ValueError: nothing is there, or no such table.
    """
    if name is None:
        return StorageOptions()
    kind, _, place = name.partition(":")
    if kind == "env":
        if place not in os.environ:
            raise ValueError(f"storage {name}: the environment has no {place}")
        return StorageOptions.parse(name, os.environ[place])
    if kind != "file":
        raise ValueError(f"storage takes env:VARIABLE, file:PATH or block:NAME, not a name that begins with {kind}:")
    try:
        content = Path(place).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"storage {name}: {error.strerror}") from error
    if not place.endswith(".toml"):
        return StorageOptions.parse(name, content)
    try:
        table = tomllib.loads(content.decode())
    except ValueError as error:
        raise ValueError(f"storage {name} is not TOML: {_place(error)}") from None
    return StorageOptions.parse(name, table)


def _place(error: ValueError) -> str:
    """Where a parser stopped, without what it saw there."""
    found = re.search(r"line \d+", str(error))
    return f"see {found[0]}" if found else "it is not even UTF-8"
