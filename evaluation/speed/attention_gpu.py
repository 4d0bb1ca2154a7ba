"""How long one layer's decode step takes on a GPU, beside its competitors and the memory's speed, in one run.

All are replays of CUDA graphs over the same layers, taken in turn so that what is read comes from memory. Each is
checked before it is timed. Floors are the bytes that must be read over the memory's measured speed.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sparsekv.command_line import new_console
from sparsekv.errors import ConfigError, SparseKVError
from sparsekv.evaluation.report import file_name, result, save_json, short

from .attention_inputs import Inputs
from .attention_points import PART_OVER_L2, Point
from .attention_step import Check, DecodeStep
from .attention_tables import print_result
from .competitors import COMPETITORS, DENSE_COMPETITORS
from .graph_timer import Spread, Timer, read_tb_per_s
from .plots import step_figure

H200_TB_PER_S = 4.39  # measured: a maximum over 4 GB, many times; a run's own measurement scatters by a percent

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How to measure: replays, names of competitors, TB/s for the floors (None: measured), checks only, folder."""

    replays: int = 20
    against: Sequence[str] = tuple(COMPETITORS)
    bandwidth: float | None = None
    check_only: bool = False
    out: str | None = None

    def __post_init__(self) -> None:
        if self.bandwidth is not None and not 0 < self.bandwidth < math.inf:
            raise ConfigError(f"--bandwidth={self.bandwidth} must be more than 0 TB/s.")


@dataclass(frozen=True)
class Machine:
    """The device, its L2 cache, and its memory's speed: for the floors, and as measured in this run."""

    device: torch.device
    l2_bytes: int
    tb_per_s: float
    measured_tb_per_s: float

    @classmethod
    def of(cls, device: torch.device, options: Options) -> Machine:
        """Measures the memory of a GPU."""
        properties = torch.cuda.get_device_properties(device)
        size = min(4 << 30, free_bytes(device) // 4)
        measured = read_tb_per_s(device, Timer(device, options.replays), size)
        usual = H200_TB_PER_S if "H200" in properties.name else measured
        return cls(device, properties.L2_cache_size, options.bandwidth or usual, measured)

    def floor_us(self, num_bytes: float) -> float:
        """Microseconds in which so many bytes can be read."""
        return num_bytes / self.tb_per_s / 1e6


def free_bytes(device: torch.device) -> int:
    """Of the device's memory; on a CPU, enough for tests."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 28


class Bench:
    """One point: makes its inputs, checks, times.

    Raises:
        SparseKVError: a check failed.
    """

    def __init__(self, point: Point, machine: Machine, timer: Timer | None) -> None:
        self.point, self.machine, self.timer = point, machine, timer
        self.num_layers = point.num_layers(machine.l2_bytes, free_bytes(machine.device))
        self.inputs = Inputs(point, self.num_layers, machine.device)
        self.step = DecodeStep(self.inputs)
        self.check = Check(self.step)

    def run(self, against: Sequence[str]) -> Row:
        """The point's row, with the median and the spread between quartiles of everything timed."""
        self.check.all()
        row: Row = {**self.point.describe(), "layers": self.num_layers}
        if self.timer is not None:
            for name, step, num_bytes in self._own_steps():
                row |= self._own(name, step, num_bytes)
        for name in against:
            row |= self._competitor(name)
        return row if self.timer is None else row | self._summary(row)

    def _own_steps(self) -> list[tuple[str, Callable[[int], object], int]]:
        """Names, steps and the bytes each has to read."""
        step, point = self.step, self.point
        steps: list[tuple[str, Callable[[int], object], int]] = [
            ("sparse", step.sparse, point.sparse_bytes),
            ("composed", step.composed, point.sparse_bytes),
            ("append", step.append, 0),
            ("dense", step.dense, point.dense_bytes),
        ]
        if not point.fits:
            scores = [step.score(i) for i in range(self.num_layers)]
            steps += [
                ("score", step.score, point.digest_bytes),
                ("select", lambda i: step.select(scores[i]), 0),
                ("attend", self._attend(scores), point.attend_bytes),
            ]
        return steps

    def _attend(self, scores: list[Tensor]) -> Callable[[int], object]:
        """Attention alone, to other pages at every turn: those of few layers would stay in the L2 cache."""
        slots = [self.step.select(score) for score in scores]
        turns = self._turns
        shift = self.point.num_pages // turns
        moved = [
            [((slot + turn * shift) % self.point.num_pages).sort(-1).values for slot in slots]
            for turn in range(turns)
        ]  # fmt: skip

        def attend(i: int) -> Tensor:
            turn, layer = divmod(i, self.num_layers)
            return self.step.attend(layer, moved[turn][layer], self.inputs.sinks)

        return attend

    @property
    def _turns(self) -> int:
        """Times that attention alone visits a layer, each time elsewhere."""
        wanted = math.ceil(PART_OVER_L2 * self.machine.l2_bytes / (self.num_layers * self.point.attend_bytes))
        return max(1, min(wanted, self.point.num_pages // self.point.k))

    def _own(self, name: str, step: Callable[[int], object], num_bytes: int) -> Row:
        count = self.num_layers * (self._turns if name == "attend" else 1)
        try:
            return self._time(name, step, count, num_bytes)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            hint = "`sparsekv doctor` says which kernels run here"
            raise SparseKVError(f"{name} does not run in a CUDA graph ({error}): no speed; {hint}.") from error

    def _competitor(self, name: str) -> Row:
        """Its time, or None and a note why: a competitor that cannot take part stops nobody else."""
        try:
            compete = COMPETITORS[name](self.inputs)
            self.check.competitor(name, compete)
            num_bytes = self.point.dense_bytes if name in DENSE_COMPETITORS else self.point.sparse_bytes
            return self._time(name, compete, self.num_layers, num_bytes)
        except SparseKVError:
            raise
        except Exception as error:  # whatever a library raises where it does not serve a shape
            return {f"{name}_us": None, f"{name}_note": (str(error) or type(error).__name__).splitlines()[0]}

    def _time(self, name: str, step: Callable[[int], object], count: int, num_bytes: int) -> Row:
        if self.timer is None:
            return {}
        spread: Spread = self.timer(step, count, self.machine.floor_us(num_bytes))
        return {f"{name}_us": spread.median, f"{name}_iqr_us": spread.high - spread.low}

    def _summary(self, row: Row) -> Row:
        """What follows from the times: floors, ratios, TB/s."""
        point, cold = self.point, PART_OVER_L2 * self.machine.l2_bytes
        floor = self.machine.floor_us(point.sparse_bytes)
        times = [row[f"{name}_us"] for name in DENSE_COMPETITORS if row.get(f"{name}_us")]
        best = min(times, default=None)

        def speed(name: str, num_bytes: int, turns: int) -> float | None:
            past_l2 = not point.fits and num_bytes * self.num_layers * turns >= cold
            return num_bytes / row[f"{name}_us"] / 1e6 if past_l2 else None

        return {
            "best_dense_us": best,
            "speedup": best and best / row["sparse_us"],
            "floor_us": floor,
            "dense_floor_us": self.machine.floor_us(point.dense_bytes),
            "of_floor": floor / row["sparse_us"],
            "score_tb_per_s": speed("score", point.digest_bytes, 1),
            "attend_tb_per_s": speed("attend", point.attend_bytes, self._turns),
            "quest_us": point.quest_us,
        }


def run(points: Sequence[Point], options: Options, device: torch.device, command: str) -> Row:
    """Measures all points, prints the tables and writes the files asked for; returns what the JSON file holds."""
    console = new_console()
    if device.index is not None:
        torch.cuda.set_device(device)
    with torch.inference_mode():
        machine = Machine.of(device, options)
        console.print(f"Memory: {machine.measured_tb_per_s:.2f} TB/s measured, {machine.tb_per_s:.2f} for the floors")
        rows = sweep(points, machine, options, command, console)
    print_result(console, rows, machine.tb_per_s, options.check_only)
    path = _save(rows, len(points), machine, options, command)
    if path is not None:
        step_figure(rows).savefig(path.with_suffix(".png"))
        console.print(f"Written: {path} and .png")
    return _content(rows, len(points), machine, options, command)


def sweep(points: Sequence[Point], machine: Machine, options: Options, command: str, console: Console) -> list[Row]:
    """A row per point. One that needs more memory than there is says so, and the others go on."""
    timer = None if options.check_only else Timer(machine.device, options.replays)
    rows: list[Row] = []
    for point in points:
        try:
            row = Bench(point, machine, timer).run(options.against)
        except torch.OutOfMemoryError:
            row = {**point.describe(), "error": "out of memory"}
        rows.append(row)
        _free(machine.device)
        console.print(_line(row))
        _save(rows, len(points), machine, options, command)  # a run that is cut short has told what it knew
    return rows


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _line(row: Row) -> str:
    where = f"{row['geometry']} batch {row['batch']} context {short(row['context'])} budget {row['budget']}"
    if "sparse_us" not in row:
        return f"{where}: {row.get('error', 'checked')}"
    faster = f", {row['speedup']:.1f}x the faster dense" if row["speedup"] else ""
    return f"{where}: {row['sparse_us']:.1f} us{faster}, {row['of_floor']:.0%} of the memory's speed"


def _save(rows: Sequence[Row], num_points: int, machine: Machine, options: Options, command: str) -> Path | None:
    if options.out is None or options.check_only:
        return None
    name = file_name("attention", "cuda", rows[0]["digest"])
    return save_json(options.out, name, _content(rows, num_points, machine, options, command))


def _content(rows: Sequence[Row], num_points: int, machine: Machine, options: Options, command: str) -> Row:
    settings = {
        "num_points": num_points,
        "tb_per_s": machine.tb_per_s,
        "measured_tb_per_s": machine.measured_tb_per_s,
        "l2_bytes": machine.l2_bytes,
        "replays": options.replays,
    }
    return result(command, settings, rows)
