"""The processes that hold one model together (tensor parallelism), and how they agree.

Each runs the same program on its part of the weights, and every forward pass waits for all of them in the middle of
every layer. Whatever changes how many passes are run is therefore decided together: `gather` and what is built on it.
It goes through the store by which the processes have found each other, not through the GPUs: it works on any of them,
and it can be waited for with a limit. What goes wrong in one process, at a place where the others do not ask, reaches
them by `together`.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from sparsekv.errors import RankError

Value = TypeVar("Value")

START = 1800.0  # seconds that a rank is waited for where it may have been busy with other things
LIMIT = 120.0  # where it should be as far as the others
PATIENCE = 5.0  # once one has failed: long enough for the others to fail by themselves
DRAIN = 30.0  # for what a GPU still has to do, once a rank has failed
MIN_PAUSE, MAX_PAUSE = 1e-4, 0.05  # between two looks whether another has come
_TORN = "torn"  # the key under which it is told that the ranks cannot go on together, and why
_KNOWN = "_sparsekv_known"  # of an exception that the others have been told of


@dataclass(frozen=True)
class _Said:
    """What a rank has told the others: at which place of the program, and what, or why it fails there."""

    place: str
    value: Any = None
    error: str | None = None


class Ranks:
    """This process and the others that hold a model with it; alone it agrees with itself, at no cost.

    Attributes:
        rank, size: which of how many this is.
    """

    rank, size = 0, 1

    @staticmethod
    def of(model: Any) -> Ranks:
        """Those that hold a model of transformers together with this process."""
        mesh = getattr(model, "_device_mesh", None)
        if mesh is None or mesh.size() == 1 or not dist.is_initialized():
            return Ranks()
        mesh = mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh
        return _of_members(tuple(mesh.mesh.flatten().tolist()))

    @staticmethod
    def of_launch() -> Ranks:
        """All processes that were launched together and have found each other."""
        size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        return _of_members(tuple(range(size)))

    def gather(self, value: Value, place: str, limit: float | None = LIMIT) -> list[Value]:
        """What every rank says, in their order. All must ask at the same place.

        Args:
            value: anything that can be pickled.
            place: told in errors.
            limit: seconds to wait for another; None: for ever.

        Raises:
            RankError: another has failed, is somewhere else or does not come.
        """
        return [value]

    def first(self, value: Value | None, place: str) -> Value | None:
        """What the first rank says that does not say None."""
        return next((found for found in self.gather(value, place) if found is not None), None)

    def all(self, is_so: bool, place: str) -> bool:
        """Whether all say yes."""
        return all(self.gather(is_so, place))

    def told(self, make: Callable[[], Value], place: str) -> Value:
        """What `make` gives in the first rank, where alone it is called; the others wait for it as long as it takes.

        Raises:
            RankError: it has failed there.
        """
        return make()

    @contextlib.contextmanager
    def together(self, place: str) -> Iterator[None]:
        """Within it, a rank that fails makes all fail: where all come out, they may go on together afterwards. Where
        one waits for another in the middle of a forward pass, its wait is ended, and the ranks are torn for good.

        Raises:
            RankError: another has failed, with its reason.
        """
        yield


class _SeveralRanks(Ranks):
    """Ranks that have a store in common.

    Args:
        members: their numbers among all that were launched together.
    """

    def __init__(self, members: tuple[int, ...], store: Any) -> None:
        self.rank, self.size, self._members = members.index(dist.get_rank()), len(members), members
        self._store = cast(Any, dist.PrefixStore(f"sparsekv/{'-'.join(map(str, members))}", store))
        self._round = 0
        threading.Thread(target=_watch, args=(self._store.clone(),), daemon=True).start()

    def gather(self, value: Value, place: str, limit: float | None = LIMIT) -> list[Value]:
        return [said.value for said in self._exchange(_Said(place, value), limit)]

    def told(self, make: Callable[[], Value], place: str) -> Value:
        value = None
        if self.rank == 0:
            try:
                value = make()
            except BaseException as error:
                self._exchange(_Said(place, error=_reason(error)), LIMIT)
                setattr(error, _KNOWN, True)
                raise
        found: Value = self._exchange(_Said(place, value), None)[0].value
        return found

    @contextlib.contextmanager
    def together(self, place: str) -> Iterator[None]:
        self.gather(None, f"the start of {place}", START)
        try:
            yield
        except BaseException as error:
            if not (isinstance(error, RankError) or hasattr(error, _KNOWN)):
                self._tell_of(error, place)
            raise
        self.gather(None, f"the end of {place}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def __reduce__(self) -> tuple[type[Ranks], tuple[()]]:
        return Ranks, ()  # another process is alone

    # -- how

    def _exchange(self, mine: _Said, limit: float | None) -> list[_Said]:
        """What all say at their next meeting."""
        self._check_whole()
        self._round += 1
        self._store.set(f"{self._round}/{self.rank}", pickle.dumps(mine))
        found = [mine if rank == self.rank else self._said_by(rank, mine, limit) for rank in range(self.size)]
        if self._round > 1:
            self._store.delete_key(f"{self._round - 1}/{self.rank}")  # who has come here has read it
        if mine.error is None:
            self._check(found)
        return found

    def _check(self, found: list[_Said]) -> None:
        for rank, said in zip(self._members, found, strict=True):
            if said.error is not None:
                raise RankError(f"Rank {rank} has failed: {said.error}")
        if len({said.place for said in found}) > 1:
            places = ", ".join(f"rank {i} at {said.place}" for i, said in zip(self._members, found, strict=True))
            raise RankError(f"The ranks have come apart ({places}): they must be given the same inputs and settings.")

    def _said_by(self, rank: int, mine: _Said, limit: float | None) -> _Said:
        key, start, pause = f"{self._round}/{rank}", time.monotonic(), MIN_PAUSE
        while not self._store.check([key]):
            self._check_whole()
            if limit is not None and time.monotonic() - start > limit:
                late = f"rank {self._members[rank]} has not come to {mine.place} within {limit:g} s"
                raise self._tear(late if mine.error is None else self._mine(mine.error))
            time.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE)
        found: _Said = pickle.loads(self._store.get(key))
        return found

    def _tell_of(self, error: BaseException, place: str) -> None:
        """Tells the others of an error that leaves `together`, or finds that it comes of another's."""
        self._check_whole(error)
        if not _is_idle():
            raise self._tear(self._mine(_reason(error))) from error
        with contextlib.suppress(RankError):  # the others do not come; this one knows why
            self._exchange(_Said(f"the end of {place}", error=_reason(error)), PATIENCE)
        setattr(error, _KNOWN, True)

    def _mine(self, reason: str) -> str:
        return f"rank {self._members[self.rank]}: {reason}"

    def _check_whole(self, cause: BaseException | None = None) -> None:
        if self._store.check([_TORN]):
            raise self._torn() from cause

    def _tear(self, reason: str) -> RankError:
        """Ends what the others wait for. The first reason is the one that all tell."""
        self._store.compare_set(_TORN, "", reason)
        return self._torn()

    def _torn(self) -> RankError:
        reason = self._store.get(_TORN).decode()
        return RankError(f"The ranks cannot go on together ({reason}). Start the processes anew.")


def _of_members(members: tuple[int, ...]) -> Ranks:
    return _several(members, dist.distributed_c10d._get_default_store()) if len(members) > 1 else Ranks()


_several = functools.cache(_SeveralRanks)


def _watch(store: Any) -> None:
    """Waits, in a thread of its own, for the ranks to be torn: what a GPU waits for is then ended from here. A CPU's
    wait ends with the process that failed, or with the time limit of the process group."""
    with contextlib.suppress(Exception):  # the processes end, and the store with them
        store.wait([_TORN], timedelta(days=365))
        if dist.is_initialized() and dist.get_backend() == "nccl":
            dist.distributed_c10d._abort_process_group()


def _is_idle() -> bool:
    """Whether a GPU has done all that it was given; it may wait for a rank that will not come."""
    if not torch.cuda.is_initialized():
        return True
    event, start = torch.cuda.Event(), time.monotonic()
    with contextlib.suppress(RuntimeError):  # which it tells of again at every call
        event.record()
        while time.monotonic() - start < DRAIN:
            if event.query():
                return True
            time.sleep(0.001)
    return False


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
