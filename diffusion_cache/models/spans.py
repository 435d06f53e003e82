"""Where a denoiser can be cached: its spans, found from its structure.

A span is a run of modules that is skipped as one: its first member's input goes in, its last member's output comes
out. What flows between, and which output belongs to which input, is read off the calls themselves
(`engine/structure.py`), so no table of model families is needed.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

from torch import nn

from ..context import SCOPES
from ..errors import ConfigError, NoSpansError
from ..registry import unknown_name
from .denoisers import unwrap

MIN_PARAMETER_SHARE = 0.005
# by the names in use across diffusers: what attention and feed-forward modules are called, and what only sounds so
BRANCH_CLASS = re.compile(
    r"Attention|Attn|FeedForward|FFN?$|MLP|Mlp|SwiGLU|MoE|GLUMB|LiteLA$|Transition$|TriangleMult|Dense$"
)
BRANCH_ATTRIBUTE = re.compile(r"^(ff|ffn|mlp|feed_forward|attn\d?|attention|self_attn|cross_attn)$")
ATTENTION = re.compile(r"attn|attention|LiteLA$", re.IGNORECASE)
COMPOSITE_CLASS = re.compile(r"Block|Transformer|Norm|Embed|(?<!MoE)Layer|Pool|Processor")
NO_BRANCH = re.compile(r"adaln|modulation|embed|processor|norm")
# stacks beside the main one, of text or conditions; they run before it or between its blocks
SIDE_STACK = re.compile(r"text|txt|context|caption|siglip|vace|face|motion|adapter|control|perceiver")


@dataclass(frozen=True, eq=False)
class Span:
    """One thing that is cached.

    kind: denoiser, stack, block, branch or cut. members: the modules that are skipped, in the order they run; the
    last one's output is what the history holds. Residuals are stored unless the kind says that input and output
    differ in nature.
    """

    name: str
    kind: str
    members: tuple[nn.Module, ...]

    @property
    def side(self) -> bool:
        """Whether this is a stack beside the main ones."""
        return self.kind == "stack" and bool(SIDE_STACK.search(self.name))

    @property
    def stores_residual(self) -> bool:
        return self.kind in ("stack", "block")

    @property
    def parameters(self) -> int:
        return sum(p.numel() for member in self.members for p in member.parameters())


class Called(NamedTuple):
    """One call of a span's member.

    linked: it took what the member before it had given; continues: all of that, as it was given. shapes: of the tensors
    that it gave itself.
    """

    span: Span
    member: int
    linked: bool = True
    continues: bool = True
    shapes: tuple[Sequence[int], ...] = ()


@dataclass(frozen=True, eq=False)
class Layout:
    """The spans of one denoiser at one scope.

    probe: the module whose input is where the probe blocks begin, tail: the one whose output is where the tail blocks
    end; None where there are none. apart: the same with the main stacks each by itself, where they are one span.
    """

    scope: str
    spans: tuple[Span, ...]
    probe: nn.Module | None = None
    tail: nn.Module | None = None
    apart: "Layout | None" = None


def stacks(denoiser: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """The denoiser's lists of blocks, each by name: composite modules that hold a real share of its parameters.

    Its own lists, or else those of its parts.
    """
    children = dict(denoiser.named_children())
    for name, child in denoiser.named_children():
        if isinstance(child, nn.ModuleDict):  # a list for each modality
            children |= {f"{name}.{key}": module for key, module in child.items()}
    own = _block_lists(denoiser, children.items())
    return own or _block_lists(denoiser, denoiser.named_modules())


def _block_lists(denoiser: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> dict[str, dict[str, nn.Module]]:
    total = sum(p.numel() for p in denoiser.parameters())
    found: dict[str, dict[str, nn.Module]] = {}
    for name, module in modules:
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        blocks = dict(_blocks(name, module))
        share = sum(p.numel() for p in module.parameters()) / max(total, 1)
        if blocks and all(any(block.children()) for block in blocks.values()) and share >= MIN_PARAMETER_SHARE:
            found[name] = blocks
    return found


def _blocks(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a ModuleList that are called: containers in it are not."""
    for key, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _blocks(f"{name}.{key}", child)
        else:
            yield f"{name}.{key}", child


def branches(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Attention and feed-forward modules inside the denoiser's blocks, by dotted name; outermost only."""
    lists = ["down_blocks", "mid_block", "up_blocks"] if is_unet(denoiser) else [*stacks(denoiser)]
    return _branches(denoiser, tuple(f"{blocks}." for blocks in lists))


def attentions(block: nn.Module) -> list[nn.Module]:
    """Attention modules inside a block; outermost only."""
    return [
        module
        for name, module in _branches(block).items()
        if ATTENTION.search(name.rpartition(".")[2]) or ATTENTION.search(type(module).__name__)
    ]


def _branches(root: nn.Module, inside: tuple[str, ...] = ("",)) -> dict[str, nn.Module]:
    """inside: what names begin with."""
    found: dict[str, nn.Module] = {}
    for name, module in root.named_modules():
        if not name.startswith(inside):
            continue
        nested = any(name.startswith(f"{outer}.") for outer in found)
        if not nested and not NO_BRANCH.search(name) and _is_branch(name.rsplit(".", 1)[-1], module):
            found[name] = module
    return found


def _is_branch(attribute: str, module: nn.Module) -> bool:
    kind = type(module).__name__
    if not any(module.children()):
        return False
    if BRANCH_ATTRIBUTE.search(attribute):
        return True
    return bool(BRANCH_CLASS.search(kind)) and not COMPOSITE_CLASS.search(kind)


def is_unet(denoiser: nn.Module) -> bool:
    return all(isinstance(getattr(denoiser, name, None), nn.ModuleList) for name in ("down_blocks", "up_blocks"))


def default_scope(denoiser: nn.Module) -> str:
    """cut for UNets (block where a level is no module), stack where there are stacks, else denoiser."""
    denoiser = unwrap(denoiser)
    if is_unet(denoiser):
        return "cut" if _has_levels(denoiser) else "block"
    return "stack" if stacks(denoiser) else "denoiser"


def find_layout(
    denoiser: nn.Module,
    scope: str,
    depth: int = 1,
    probe: int = 0,
    tail: int = 0,
    blocks: Sequence[str] = (),
    adaptive: bool = False,
) -> Layout:
    """The denoiser's spans at a scope.

    depth: for cuts, how many down and up blocks stay outside (1 skips most). probe, tail: for stacks, how many
    blocks at the front of the first and the end of the last stack stay outside. blocks: at scope block of
    transformers, the names of those to cache, of which neighbours are one span; () for all, each a span of its own.
    adaptive: whether decisions wait for what enters the first stack; those beside the main ones are left out then.

    Raises:
        NoSpansError: if there is nothing to cache at this scope.
        ConfigError: for depth, probe or tail that leave nothing to skip, and blocks that do not exist.
    """
    inner = unwrap(denoiser)
    if scope not in SCOPES:
        raise unknown_name("scope", scope, SCOPES)
    if blocks:
        return _runs_layout(inner, scope, blocks)
    if scope == "denoiser":
        return Layout(scope, (Span("denoiser", scope, (denoiser,)),))
    if scope == "branch":
        spans = tuple(Span(name, scope, (module,)) for name, module in branches(inner).items())
        if not spans:
            raise NoSpansError(f"{type(inner).__name__} has no attention or feed-forward modules inside its blocks")
        return Layout(scope, spans)
    if is_unet(inner):
        if scope == "cut":
            return _cut_layout(inner, depth)
        if scope == "block":
            return Layout(scope, tuple(Span(name, scope, (block,)) for name, block in _unet_blocks(inner)))
        raise NoSpansError(f"{type(inner).__name__} is a UNet, which has no {scope}; use scope cut, block or denoiser")
    found = stacks(inner)
    if scope == "cut" or not found:
        others = "stack, block or denoiser" if found else "denoiser"
        raise NoSpansError(f"{type(inner).__name__} has no {scope} to cache; use scope {others}")
    if scope == "block":
        named = (item for stack in found.values() for item in stack.items())
        return Layout(scope, tuple(Span(name, scope, (block,)) for name, block in named))
    return _stack_layout(inner, found, probe, tail, adaptive)


def _runs_layout(denoiser: nn.Module, scope: str, chosen: Sequence[str]) -> Layout:
    found = {} if is_unet(denoiser) else stacks(denoiser)
    if scope != "block" or not found:
        raise ConfigError(
            f"blocks are chosen by name at scope block of a transformer, not at scope {scope} of "
            f"{type(denoiser).__name__}"
        )
    known = [name for stack in found.values() for name in stack]
    for name in chosen:
        if name not in known:
            raise unknown_name("block", name, known)
    spans = []
    for stack in found.values():
        for cached, run in groupby(stack, key=set(chosen).__contains__):
            if cached:
                names = list(run)
                name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
                spans.append(Span(name, scope, tuple(stack[block] for block in names)))
    return Layout(scope, tuple(spans))


def _stack_layout(
    denoiser: nn.Module, found: Mapping[str, Mapping[str, nn.Module]], probe: int, tail: int, adaptive: bool
) -> Layout:
    if probe or tail or adaptive:
        # side stacks may run before it is known what to do
        found = {name: stack for name, stack in found.items() if not SIDE_STACK.search(name)} or found
    names = list(found)
    blocks = {name: list(stack.values()) for name, stack in found.items()}
    sizes = ", ".join(f"{name}: {len(stack)}" for name, stack in found.items())
    total = sum(map(len, found.values()))
    if probe + tail >= total or probe > len(found[names[0]]) or tail > len(found[names[-1]]):
        raise ConfigError(
            f"front={probe} and back={tail} blocks cannot be kept out of {type(denoiser).__name__} ({sizes}): "
            f"front must fit in the first stack, back in the last, and at least one block must remain to be skipped"
        )
    first_block, last_block = blocks[names[0]][0], blocks[names[-1]][-1]
    blocks[names[0]] = blocks[names[0]][probe:]
    blocks[names[-1]] = blocks[names[-1]][: len(blocks[names[-1]]) - tail]
    spans = tuple(Span(name, "stack", tuple(members)) for name, members in blocks.items() if members)
    return Layout("stack", spans, first_block if probe else None, last_block if tail else None)


def arrange(layout: Layout, trace: Sequence[Called]) -> Layout:
    """The layout as one call ran it; trace: members in the order they were called.

    Members take the order in which they ran, and spans whose members took turns become one; side stacks that run
    between the blocks of another, or are no chain, are left out. Stacks that were joined and do not continue each
    other are taken apart. The layout itself where nothing changes.
    """
    if layout.apart is None:
        return _arranged(layout, trace)
    places = {module: (span, place) for span in layout.apart.spans for place, module in enumerate(span.members)}
    retold = [called._replace(span=span, member=place) for called in trace for span, place in [places[_module(called)]]]
    apart = _arranged(layout.apart, retold)
    if not _continue(layout, trace):
        return apart
    arranged = _arranged(layout, trace)
    return layout if arranged is layout and apart is layout.apart else replace(arranged, apart=apart)


def _module(called: Called) -> nn.Module:
    return called.span.members[called.member]


def _continue(layout: Layout, trace: Sequence[Called]) -> bool:
    """Whether main stacks that are one span do the same to a sample as each by itself.

    Each begins right after the one before it with all that this gave, tensors of different shapes, and the last gives
    some of these: then what the whole adds to a stream is the sum of what they add to it.
    """
    assert layout.apart is not None
    (whole,) = (span for span in layout.spans if not span.side)
    own = [called.member for called in trace if called.span is whole]
    count = len(whole.members)
    if not own or own != [*range(count)] * (len(own) // count):
        return False
    *ends, _ = accumulate(len(span.members) for span in layout.apart.spans if not span.side)
    streams: set[Any] = set()
    for before, after in pairwise(trace):
        if before.span is whole and before.member + 1 in ends:
            streams = set(before.shapes)
            if after.span is not whole or not after.continues or len(streams) < len(before.shapes):
                return False
    return all(streams.issuperset(called.shapes) for called in trace if _module(called) is whole.members[-1])


def _arranged(layout: Layout, trace: Sequence[Called]) -> Layout:
    first: dict[tuple[Span, int], int] = {}
    for place, called in enumerate(trace):
        first.setdefault((called.span, called.member), place)
    loose = {called.span for called in trace if called.member and not called.linked}
    between = [span for span in layout.spans if span.side and (span in loose or _is_between(span, layout.spans, first))]
    first = {key: place for key, place in first.items() if key[0] not in between}
    groups: list[tuple[list[Span], int, int]] = []  # spans, first and last place
    for span in sorted((span for span in layout.spans if _places(span, first)), key=lambda s: min(_places(s, first))):
        places = _places(span, first)
        if groups and min(places) < groups[-1][2]:
            spans, start, end = groups.pop()
            groups.append(([*spans, span], start, max(end, *places)))
        else:
            groups.append(([span], min(places), max(places)))
    arranged = []
    for spans, _, _ in groups:
        ran = sorted((key for key in first if key[0] in spans), key=lambda key: first[key])
        members = tuple(owner.members[member] for owner, member in ran)
        known = len(spans) == 1 and len(members) > 1 and members == spans[0].members
        name = "+".join(span.name for span in spans)
        arranged.append(spans[0] if known or len(members) < 2 else Span(name, spans[0].kind, members))
    if not between and set(arranged) <= set(layout.spans):
        return layout
    never = [span for span in layout.spans if span not in between and not _places(span, first)]
    return replace(layout, spans=(*arranged, *never))


def _is_between(side: Span, spans: Iterable[Span], first: Mapping[tuple[Span, int], int]) -> bool:
    own = _places(side, first)
    others = [_places(span, first) for span in spans if span is not side and not span.side]
    return any(own and places and min(own) < max(places) and max(own) > min(places) for places in others)


def joined(layout: Layout) -> Layout:
    """The layout with its main stacks as one span, until `arrange` sees that they do not continue each other."""
    return replace(merged(layout), apart=layout) if sum(not span.side for span in layout.spans) > 1 else layout


def merged(layout: Layout) -> Layout:
    """The layout with all its main stacks as one span, for models whose later blocks take earlier ones' outputs."""
    main = [span for span in layout.spans if not span.side]
    members = tuple(member for span in main for member in span.members)
    whole = Span("+".join(span.name for span in main), main[0].kind, members)
    return replace(layout, spans=(*(span for span in layout.spans if span.side), whole))


def _places(span: Span, first: Mapping[tuple[Span, int], int]) -> list[int]:
    return [first[span, member] for member in range(len(span.members)) if (span, member) in first]


def _unet_blocks(unet: Any) -> list[tuple[str, nn.Module]]:
    blocks = [*_blocks("down_blocks", unet.down_blocks)]
    if getattr(unet, "mid_block", None) is not None:
        blocks.append(("mid_block", unet.mid_block))
    return [*blocks, *_blocks("up_blocks", unet.up_blocks)]


def _has_levels(unet: Any) -> bool:
    """Whether each level of a UNet is one module, so that cuts can be made."""
    return not any(isinstance(level, nn.ModuleList) for level in (*unet.down_blocks, *unet.up_blocks))


def _cut_layout(unet: Any, depth: int) -> Layout:
    if not _has_levels(unet):
        raise NoSpansError(f"{type(unet).__name__} runs the blocks of its levels one by one; use scope block")
    deepest = min(len(unet.down_blocks), len(unet.up_blocks))
    if getattr(unet, "mid_block", None) is None:
        deepest -= 1
    if not 1 <= depth <= deepest:
        raise ConfigError(f"depth must be between 1 and {deepest} for {type(unet).__name__}, not {depth}")
    named = _unet_blocks(unet)
    members = [block for _, block in named[depth : len(named) - depth]]
    return Layout("cut", (Span(f"cut.{depth}", "cut", tuple(members)),))
