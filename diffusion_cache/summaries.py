"""What a generation did, and what a pipeline offers to cache, as data and as tables."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .engine import CacheRun, Method, StepRecord
from .forecasters.fitted import UNFITTED
from .policies import Planned

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

FEW_STEPS = 8  # in so few, hardly a step is like the one before it


@dataclass(frozen=True)
class Summary:
    """What one generation did.

    spans: things cached, over all denoisers. computed, reused: denoiser calls in which any span was computed, or
    none. replayed: denoiser calls that a CUDA graph made. hit_rate: share of span calls that were reused. cache_bytes:
    the most bytes that features took, of which resident_bytes at most were on the denoiser's device at once; what
    adaptive policies keep of a step to compare the next one with is not among them. total: steps of the run, if known.
    warnings: all that this run gave reason for; Python shows each text once a process. notes: what is worth knowing of
    the run, and was not warned of.
    """

    method: str
    scopes: tuple[str, ...]
    spans: int
    total: int | None
    records: tuple[StepRecord, ...]
    cache_bytes: int
    resident_bytes: int
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def computed(self) -> int:
        return sum(record.computed for record in self.records)

    @property
    def reused(self) -> int:
        return len(self.records) - self.computed

    @property
    def replayed(self) -> int:
        return sum(record.replayed for record in self.records)

    @property
    def hit_rate(self) -> float:
        visits = sum(record.spans for record in self.records)
        return sum(record.spans_reused for record in self.records) / visits if visits else 0.0

    @property
    def unfitted(self) -> int:
        """Reused calls that a plan has no fitted weights for: its own choice, or the run departs from the plan."""
        return sum(record.note == UNFITTED for record in self.records if record.spans_reused)

    @property
    def cache_mib(self) -> float:
        return self.cache_bytes / 2**20

    def __rich__(self) -> "Table":
        from rich.table import Table

        table = Table(title=_text(self.method, "table.title"), caption=_text(self._caption(), "table.caption"))
        table.add_column("pass")
        table.add_column("steps (█ computed, · reused)", overflow="fold")
        table.add_column("computed", justify="right")
        table.add_column("reasons to compute")
        for key in dict.fromkeys((record.denoiser, record.pass_name) for record in self.records):
            rows = [record for record in self.records if (record.denoiser, record.pass_name) == key]
            # what some samples ask for follows how many do: "1 of 4 samples: guard (…)"
            whys = (record.reason.rpartition(" samples: ")[2] for record in rows if record.computed)
            reasons = dict.fromkeys(why.split(" ")[0] for why in whys)
            strip = "".join("█" if row.spans_reused == 0 else "·" if not row.computed else "▒" for row in rows)
            computed = sum(row.computed for row in rows)
            table.add_row(*map(_text, (" ".join(key), strip, f"{computed}/{len(rows)}", ", ".join(reasons))))
        return table

    def _caption(self) -> str:
        return (
            f"{self.spans} span(s) at scope {'/'.join(self.scopes)}, "
            f"{self.computed} calls computed and {self.reused} reused, "
            f"hit rate {self.hit_rate:.0%}, cache {self.cache_mib:.2f} MiB"
            + f"; {self.replayed} calls by CUDA graphs" * bool(self.replayed)
            + (f"; {self.unfitted} of the reused forecast by Taylor, for want of fitted weights" * bool(self.unfitted))
            + "".join(f"\nwarning: {message}" for message in self.warnings)
            + "".join(f"\nnote: {message}" for message in self.notes)
        )

    def __str__(self) -> str:
        return _rendered(self)


@dataclass(frozen=True)
class SpanInfo:
    """One span. feature_bytes: of one stored feature over all passes, None until something was generated, 0 where
    nothing was stored, as of spans that are always computed.

    Where the newest feature is stored otherwise than older ones ("int8-delta"), their mean.
    """

    denoiser: str
    name: str
    kind: str
    modules: int
    parameters: int
    feature_bytes: int | None


@dataclass(frozen=True)
class Inspection:
    """What a pipeline offers to cache. history: features kept per span and pass by the forecaster asked about."""

    pipeline: str
    spans: tuple[SpanInfo, ...]
    history: int

    @property
    def cache_bytes(self) -> int | None:
        """Bytes a cache of this many features would take, None if no feature has been seen."""
        if any(span.feature_bytes is None for span in self.spans):
            return None
        return self.history * sum(span.feature_bytes or 0 for span in self.spans)

    def __rich__(self) -> "Table":
        from rich.table import Table

        known = self.cache_bytes
        caption = (
            f"a cache of {self.history} feature(s) a span takes {known / 2**20:.2f} MiB"
            if known is not None
            else "bytes are known after a generation, or with inspect(pipe, inputs={…the pipeline's arguments…})"
        )
        table = Table(title=_text(self.pipeline, "table.title"), caption=_text(caption, "table.caption"))
        for name in ("denoiser", "span", "kind"):
            table.add_column(name)
        for name in ("modules", "parameters", "feature KiB"):
            table.add_column(name, justify="right")
        for span in self.spans:
            size = "?" if span.feature_bytes is None else f"{span.feature_bytes / 1024:.1f}"
            cells = (span.denoiser, span.name, span.kind, str(span.modules), f"{span.parameters:,}", size)
            table.add_row(*map(_text, cells))
        return table

    def __str__(self) -> str:
        return _rendered(self)


def summarise(cache_run: CacheRun) -> Summary:
    """What a run has done so far."""
    layouts = cache_run.layouts.values()
    scopes = tuple(dict.fromkeys(layout.scope for layout in layouts))
    scope = scopes[0] if len(scopes) == 1 else cache_run.method.scope  # the one that the default stood for
    return Summary(
        method=_described(replace(cache_run.method, guarded=cache_run.decisions.guarded, scope=scope)),
        scopes=scopes,
        spans=sum(len(layout.spans) for layout in layouts),
        total=cache_run.clock.total,
        records=tuple(cache_run.records),
        cache_bytes=cache_run.cache_bytes,
        resident_bytes=cache_run.resident_bytes,
        warnings=tuple(cache_run.messages),
        notes=_notes(cache_run),
    )


def _notes(cache_run: CacheRun) -> tuple[str, ...]:
    """That a run has few steps, which a plan was measured for and a policy was not."""
    method, records, total = cache_run.method, cache_run.records, cache_run.clock.total
    if total is None or method.stream is not None or isinstance(method.guarded.policy, Planned):
        return ()
    steps = max([total, *(record.step + 1 for record in records)])  # of the longest loop
    if steps > FEW_STEPS or not any(record.spans_reused for record in records):
        return ()
    return (
        f"{steps} steps leave little to reuse, as hardly one is like the one before it: `recommend` advises against a "
        f"cache of {FEW_STEPS} steps or fewer",
    )


def _described(method: Method) -> str:
    policy = method.guarded.policy
    if not isinstance(policy, Planned):
        return str(method)
    plan = policy.plan
    drift = method.guarded.drift
    watched = f", watched by {drift.band.signal}" if drift is not None else ""
    return f"plan {plan.name!r}: {plan.nfe:.4g} of {plan.total} steps computed, on {plan.scope}{watched}"


def _text(shown: str, style: str = "") -> "Text":
    """As it is: brackets are no markup."""
    from rich.text import Text

    return Text(shown, style)


def _rendered(shown: Any) -> str:
    from rich.console import Console

    console = Console(width=110)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()
