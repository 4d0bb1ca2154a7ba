"""How long one layer's decode step takes, beside its competitors and the memory's speed, in one run.

The policy's own step is timed, over several layers in turn so that what is read comes from memory; on a GPU all are
replays of CUDA graphs. Each is checked before it is timed. Floors are the bytes that must be read over the memory's
measured speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sparsekv.command_line import new_console
from sparsekv.errors import ConfigError, SparseKVError
from sparsekv.evaluation.report import file_name, result, save_json
from sparsekv.policies import POLICIES, DecodeStep

from .attention_check import Check, Choice, ways_to_decode
from .attention_inputs import Inputs
from .attention_points import PART_OVER_L2, LayerPoint
from .competitors import COMPETITORS, DENSE_COMPETITORS
from .graph_timer import Spread, Step, Timer, free, free_bytes, read_tb_per_s
from .plots import step_figure
from .tables import print_steps, step_line

H200_TB_PER_S = 4.39  # measured: a maximum over 4 GB, many times; a run's own measurement scatters by a percent
CPU_CACHE_BYTES = 32 << 20  # supposed, not asked
BETWEEN = "between"  # the step before, which fills no page

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
        """Measures the memory."""
        measured = read_tb_per_s(device, Timer(device, options.replays))
        gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        usual = H200_TB_PER_S if gpu is not None and "H200" in gpu.name else measured
        l2_bytes = CPU_CACHE_BYTES if gpu is None else gpu.L2_cache_size
        return cls(device, l2_bytes, options.bandwidth or usual, measured)

    def floor_us(self, num_bytes: float) -> float:
        """Microseconds in which so many bytes can be read."""
        return num_bytes / self.tb_per_s / 1e6


class LayerBench:
    """One point: makes its inputs, checks, times.

    Raises:
        SparseKVError: a check failed.
    """

    def __init__(self, point: LayerPoint, machine: Machine, timer: Timer | None) -> None:
        self.point, self.machine, self.timer = point, machine, timer
        self.policy = POLICIES.get(point.config.policy)()
        self.num_layers = point.num_layers(machine.l2_bytes, free_bytes(machine.device))
        self.inputs = Inputs(point, self.num_layers, machine.device)
        self.check = Check(self.inputs, self.policy)

    def run(self, against: Sequence[str]) -> Row:
        """The point's row, with the median and the spread between quartiles of everything timed."""
        self.point = replace(self.point, listed=self.check.all())
        row: Row = {**self.point.describe(), "layers": self.num_layers}
        if self.timer is not None:
            for name, step, num_bytes in [*self._steps(), *self._parts()]:
                row |= self._own(name, step, num_bytes)
            row |= self._over_a_page(row)
        for name in against:
            row |= self._competitor(name)
        return row if self.timer is None else row | self._summary(row)

    def _steps(self) -> list[tuple[str, Step, int]]:
        """Whole steps, the append alone, and dense attention: names, calls and the bytes each has to read."""
        layers, sinks, point = self.inputs.layers, self.inputs.sinks, self.point

        def whole(decode: Callable[..., object], layers: Sequence[DecodeStep] = layers) -> Step:
            return lambda i: decode(layers[i], 0.0, sinks)

        ways = ways_to_decode(self.policy)
        before = [replace(step, seq_lens=step.seq_lens - 1) for step in layers]
        return [
            *((name, whole(decode), point.sparse_bytes) for name, decode in ways.items()),
            (BETWEEN, whole(ways["sparse"], before), point.sparse_bytes),
            ("append", lambda i: layers[i].append(), 0),
            ("dense", lambda i: layers[i].attend(None, 0.0, sinks), point.dense_bytes),
        ]

    def _over_a_page(self, row: Row) -> Row:
        """The step's time on average over a page's. The contexts of presets end with a full page, whose digest only
        that last step makes: what it takes is kept, too."""
        page_size = self.point.config.page_size
        if self.point.context % page_size:
            return {}
        mean = (row["sparse_us"] + (page_size - 1) * row[f"{BETWEEN}_us"]) / page_size
        return {"sparse_us": mean, "filling_us": row["sparse_us"]}

    def _parts(self) -> list[tuple[str, Step, int]]:
        """The other parts, as far as the policy has them: nothing is chosen where everything is read."""
        layers, point = self.inputs.layers, self.point
        if layers[0].fits:
            return []
        choices = [Choice.of(self.policy, step) for step in layers]
        parts: list[tuple[str, Step, int]] = []
        if choices[0].asks_digests:
            parts.append(("score", lambda i: layers[i].digest_scores(), point.score_bytes))
        scores = [choice.scores for choice in choices if choice.scores is not None]
        if scores:
            parts.append(("select", lambda i: layers[i].select(scores[i], choices[i].min_score), 0))
        slots = [choice.slots for choice in choices if choice.slots is not None]
        if slots:
            parts.append(("attend", self._attend(slots), point.attend_bytes))
        return parts

    def _attend(self, slots: Sequence[Tensor]) -> Step:
        """Attention alone, to other pages at every turn: those of few layers would stay in the L2 cache."""
        num_pages, layers, sinks = self.point.num_pages, self.inputs.layers, self.inputs.sinks
        shift = num_pages // self._turns

        def moved(turn: int, listed: Tensor) -> Tensor:
            pages = ((listed + turn * shift) % num_pages).masked_fill(listed < 0, num_pages).sort(-1).values
            return pages.masked_fill(pages == num_pages, -1)

        turns = [[moved(turn, listed) for listed in slots] for turn in range(self._turns)]

        def attend(i: int) -> Tensor:
            turn, layer = divmod(i, self.num_layers)
            return layers[layer].attend(turns[turn][layer], 0.0, sinks)

        return attend

    @property
    def _turns(self) -> int:
        """Times that attention alone visits a layer, each time elsewhere."""
        wanted = math.ceil(PART_OVER_L2 * self.machine.l2_bytes / (self.num_layers * self.point.attend_bytes))
        return max(1, min(wanted, self.point.num_pages // self.point.k))

    def _own(self, name: str, step: Step, num_bytes: int) -> Row:
        count = self.num_layers * (self._turns if name == "attend" else 1)
        try:
            return self._time(name, step, count, num_bytes)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or self.machine.device.type != "cuda":
                raise
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

    def _time(self, name: str, step: Step, count: int, num_bytes: int) -> Row:
        if self.timer is None:
            return {}
        spread: Spread = self.timer(step, count, self.machine.floor_us(num_bytes))
        return {f"{name}_us": spread.median, f"{name}_iqr_us": spread.high - spread.low}

    def _summary(self, row: Row) -> Row:
        """What follows from the times: floors, ratios, TB/s."""
        point, cold = self.point, PART_OVER_L2 * self.machine.l2_bytes
        floor = self.machine.floor_us(point.sparse_bytes)
        best = min((row[f"{name}_us"] for name in DENSE_COMPETITORS if row.get(f"{name}_us")), default=None)

        def speed(name: str, num_bytes: int, turns: int) -> float | None:
            past_l2 = f"{name}_us" in row and num_bytes * self.num_layers * turns >= cold
            return num_bytes / row[f"{name}_us"] / 1e6 if past_l2 else None

        return {
            "best_dense_us": best,
            "speedup": best and best / row["sparse_us"],
            "floor_us": floor,
            "dense_floor_us": self.machine.floor_us(point.dense_bytes),
            "of_floor": floor / row["sparse_us"],
            "score_tb_per_s": speed("score", point.score_bytes, 1),
            "attend_tb_per_s": speed("attend", point.attend_bytes, self._turns),
            "quest_us": point.quest_us,
        }


def run(points: Sequence[LayerPoint], options: Options, device: torch.device, command: str) -> Row:
    """Measures all points, prints the tables and writes the files asked for; returns what the JSON file holds."""
    console = new_console()
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    with torch.inference_mode():
        machine = Machine.of(device, options)
        settings = {
            "num_points": len(points),
            "tb_per_s": machine.tb_per_s,
            "measured_tb_per_s": machine.measured_tb_per_s,
            "l2_bytes": machine.l2_bytes,
            "replays": options.replays,
        }

        def save(rows: Sequence[Row]) -> Path | None:
            if options.out is None or options.check_only:
                return None
            name = file_name("attention", device.type, [point.config for point in points])
            return save_json(options.out, name, result(command, settings, rows))

        console.print(f"Memory: {machine.measured_tb_per_s:.3g} TB/s measured, {machine.tb_per_s:.3g} for the floors")
        rows = sweep(points, machine, options, save, console)
    print_steps(console, rows, machine.tb_per_s, options.check_only)
    path = save(rows)
    if path is not None:
        step_figure(rows).savefig(path.with_suffix(".png"))
        console.print(f"Written: {path} and .png")
    return result(command, settings, rows)


def sweep(
    points: Sequence[LayerPoint],
    machine: Machine,
    options: Options,
    save: Callable[[Sequence[Row]], object],
    console: Console,
) -> list[Row]:
    """A row per point. One that needs more memory than there is says so, and the others go on. What is known is saved
    after each: a run that is cut short has told it."""
    timer = None if options.check_only else Timer(machine.device, options.replays)
    rows: list[Row] = []
    for point in points:
        try:
            row = LayerBench(point, machine, timer).run(options.against)
        except torch.OutOfMemoryError:
            row = {**point.describe(), "error": "out of memory"}
        rows.append(row)
        free(machine.device)
        console.print(step_line(row))
        save(rows)
    return rows
