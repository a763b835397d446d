"""Random chains of segments, and a reader that walks them item by item: the slow truth for stream and ledger."""

from itertools import islice

from hypothesis import strategies as st

from zexp.data.mix import Table
from zexp.data.stream import Segment

L = 8
PACKINGS = ("p0", "p1", "p2")


def root(streams, id_="s0"):
    return Segment(id_, {"parent": None, "seq_len": L, "streams": streams})


def child(parent, items, streams, id_):
    """A segment that leaves `parent` after it has read `items` items."""
    start = (parent.semantic["parent"] or {"tokens": 0})["tokens"] + items * L
    return Segment(id_, {"parent": {"id": parent.id, "tokens": start}, "seq_len": L, "streams": streams})


def fresh(packing, weight, seed=0):
    return {"packing": packing, "weight": weight, "seed": seed}


def replay(parent, weight, start="continue"):
    return {"replay": parent.id, "start": start, "weight": weight}


def split(draw, parts):
    """4096 cut into `parts` positive weights."""
    cuts = sorted(draw(st.sets(st.integers(1, 4095), min_size=parts - 1, max_size=parts - 1)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, 4096], strict=True)]


@st.composite
def chains(draw, max_segments=3):
    """(chain, items that the last segment has read)."""
    chain = []
    for position in range(draw(st.integers(1, max_segments))):
        packings = draw(st.lists(st.sampled_from(PACKINGS), unique=True, min_size=0 if chain else 1, max_size=3))
        kind = draw(st.sampled_from(["fresh", "continue", "beginning"])) if chain else "fresh"
        if not packings and kind == "fresh":
            kind = "continue"
        weights = split(draw, len(packings) + (kind != "fresh"))
        streams = [fresh(p, w, seed=int(p[1])) for p, w in zip(packings, weights, strict=False)]
        if kind != "fresh":
            streams.insert(0, replay(chain[-1], weights[-1], kind))
        if not chain:
            chain.append(root(streams))
        else:
            chain.append(child(chain[-1], draw(st.integers(0, 30)), streams, f"s{position}"))
    return chain, draw(st.integers(0, 30))


def read(chain):
    """(packing, seed, window, replayed) of each item of the chain's last segment, for ever; one step at a time."""
    *ancestors, last = chain
    table = Table([entry["weight"] for entry in last.semantic["streams"]])
    cursors = highest(ancestors, last)
    sources = []
    for entry in last.semantic["streams"]:
        if "packing" in entry:
            sources.append(_windows(entry["packing"], entry["seed"], cursors.get(entry["packing"], 0)))
        else:
            sources.append(_replayed(ancestors, last, entry["start"], is_mix=len(table.weights) > 1 or
                                     entry["start"] == "beginning"))
    item = 0
    while True:
        yield next(sources[table.source_of(item)[0]])
        item += 1


def read_so_far(chain, items):
    """Per segment, everything read by the time the last segment has read `items` items."""
    result = []
    for position in range(len(chain)):
        count = items if position + 1 == len(chain) else items_of(chain, position)
        result.append(list(islice(read(chain[: position + 1]), count)))
    return result


def items_of(chain, position):
    """Items that a segment has read where the next one leaves it."""
    start = (chain[position].semantic["parent"] or {"tokens": 0})["tokens"]
    return (chain[position + 1].semantic["parent"]["tokens"] - start) // L


def highest(ancestors, last):
    if not ancestors:
        return {}
    cursors = {}
    for items in read_so_far(ancestors, items_of([*ancestors, last], len(ancestors) - 1)):
        for packing, _, window, _ in items:
            cursors[packing] = max(cursors.get(packing, 0), window + 1)
    return cursors


def _windows(packing, seed, window):
    while True:
        yield packing, seed, window, False
        window += 1


def _replayed(ancestors, last, start, is_mix):
    skip = items_of([*ancestors, last], len(ancestors) - 1)
    if start == "beginning":
        skip = 0
        while [e.get("start") for e in ancestors[-1].semantic["streams"]] == ["continue"]:
            ancestors = ancestors[:-1]
    for packing, seed, window, replayed in islice(read(ancestors), skip, None):
        yield packing, seed, window, replayed or is_mix
