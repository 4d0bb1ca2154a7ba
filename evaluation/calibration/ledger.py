"""What was measured, in a file of JSON lines: whoever asks again gets it from there.

The first line says of which model, text and settings; a line each says what a document, or a token's read, came to.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from sparsekv import POLICIES, SparseConfig
from sparsekv.errors import ConfigError
from sparsekv.evaluation.accuracy.methods import Method
from sparsekv.evaluation.accuracy.results import Line, LineFile, read_lines

from .measure import Nats

# Between the settings of a calibration.
VARYING = ("policy", "digest", "group_pooling", "budget", "prefill", "prefill_mass")


class Measures(Protocol):
    """What measures: `Measurer`."""

    at_once: int

    def nats(self, config: SparseConfig, numbers: Sequence[int]) -> list[Nats]: ...

    def bytes_per_token(self, config: SparseConfig, numbers: Sequence[int]) -> float: ...

    def density(self, config: SparseConfig, numbers: Sequence[int]) -> float: ...


class Ledger:
    """What is known of settings.

    Args:
        path: of the file; it may be there, of the same calibration.
        identity: what all of it depends on; circumstances: where and when it began.
        dense: the setting that the others are compared with.

    Attributes:
        tell: called with a setting before documents are measured, and with None when they are.

    Raises:
        ConfigError: the file is of another calibration, or is none.
    """

    def __init__(
        self, path: Path, identity: Line, circumstances: Line, measures: Measures, dense: SparseConfig
    ) -> None:  # fmt: skip
        self.measures, self.dense = measures, dense
        self.tell: Callable[[SparseConfig | None], object] = lambda config: None
        self._nats: defaultdict[str, dict[int, Nats]] = defaultdict(dict)
        self._costs: dict[tuple[str, str], float] = {}
        lines = list(read_lines(path.parent, path.name))
        self._check(path, identity, lines)
        self._file = LineFile(path)
        if not lines:
            self._file.add([{"calibration": identity, **circumstances}])
        for line in lines[1:]:
            self._note(line)

    def measure(self, configs: Sequence[SparseConfig], count: int) -> None:
        """Measures what is missing of settings, and of dense, in the first `count` documents: a block of documents by
        all of them, then the next, so that each is prefilled once."""
        for start in range(0, count, self.measures.at_once):
            block = range(start, min(start + self.measures.at_once, count))
            for config in (self.dense, *configs):
                name = _name(config)
                missing = [n for n in block if n not in self._nats[name]]
                if missing:
                    self.tell(config)
                    nats = self.measures.nats(config, missing)
                    self._add(
                        [{"setting": name, "document": n, "nats": x} for n, x in zip(missing, nats, strict=True)]
                    )
                    self.tell(None)

    def nats(self, config: SparseConfig, count: int) -> list[Nats]:
        """Nats per token of the first `count` documents, measured if they are not yet."""
        self.measure([config], count)
        return [self._nats[_name(config)][n] for n in range(count)]

    def changes(self, config: SparseConfig, count: int) -> tuple[list[float], list[float]]:
        """The losses above dense in the first `count` documents, natural and recall, in nats per token."""
        pairs = list(zip(self.nats(config, count), self.nats(self.dense, count), strict=True))
        natural, recall = ([ours[i] - dense[i] for ours, dense in pairs] for i in (0, 1))
        return natural, recall

    def bytes_per_token(self, config: SparseConfig) -> float:
        """What a token reads of the cache, in all layers."""
        return self._cost("bytes", config, self.measures.bytes_per_token)

    def density(self, config: SparseConfig) -> float:
        """The share of a prompt's blocks that is computed."""
        return self._cost("density", config, self.measures.density)

    def _cost(self, kind: str, config: SparseConfig, measure: Callable[..., float]) -> float:
        name = _name(config)
        if (kind, name) not in self._costs:
            self._add([{"setting": name, kind: measure(config, range(self.measures.at_once))}])
        return self._costs[kind, name]

    def _add(self, lines: Sequence[Line]) -> None:
        self._file.add(lines)
        for line in lines:
            self._note(line)

    def _note(self, line: Line) -> None:
        if "nats" in line:
            natural, recall = line["nats"]
            self._nats[line["setting"]][line["document"]] = natural, recall
        for kind in line.keys() & {"bytes", "density"}:
            self._costs[kind, line["setting"]] = line[kind]

    def _check(self, path: Path, identity: Line, lines: Sequence[Line]) -> None:
        if not lines:
            return
        was: Any = lines[0].get("calibration")
        if not isinstance(was, dict):
            raise ConfigError(f"{path} is no record of a calibration. Move it away, or choose another --out.")
        now = json.loads(json.dumps(identity))
        differ = [f"{name} was {was.get(name)!r} and is {now[name]!r}" for name in now if was.get(name) != now[name]]
        if differ:
            raise ConfigError(
                f"{path} is of another calibration ({'; '.join(differ)}). Choose another --out, or delete that file."
            )


def _name(config: SparseConfig) -> str:
    """What a line calls a setting; of a digest that was changed, another name than before."""
    if POLICIES.get(config.policy).reads_all:
        return config.policy
    told = {name: getattr(config, name) for name in VARYING}
    code = Method("", config.policy, config.digest).own_code()
    return json.dumps(told if code is None else {**told, "code": code})
