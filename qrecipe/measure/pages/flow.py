"""The plan as a graph: one row for each site, one line for each tensor, int8 or float.

As in a history of commits, a tensor keeps a lane of its own from the row that computes it to the
last row that reads it, so that a skip connection passes beside the rows that do not read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qrecipe.errors.text import counted
from qrecipe.measure.pages.charts import short_name
from qrecipe.planning.plan import Plan, Site
from qrecipe.terminal.report import escaped

Domain = Literal["int8", "float"]
Kind = Literal["input", "quantized", "passthrough", "float", "output"]

_LANE, _ROW, _DOT = 24, 32, 6
_LETTER = 7.6
"""The width of a letter, in pixels: no less than in any browser's monospace font of 12 px."""

_OUTPUT = "output"
_SIZES = (50, 75, 100, 150, 200)


@dataclass(frozen=True, slots=True)
class Row:
    """An input, a site, or the output of the model; ``reads`` are rows by their names.

    ``domain`` is that of its result, and ``takes`` that of what it reads.
    """

    name: str
    kind: Kind
    words: str
    domain: Domain
    reads: tuple[str, ...] = ()
    why: str = ""
    takes: Domain = "float"


@dataclass(slots=True)
class Line:
    """A tensor: its lane, the row that computes it, and the rows that read it."""

    start: int
    domain: Domain
    lane: int = 0
    readers: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PlanGraph:
    """The picture of a plan, to be moved in a box of its own and shown in several sizes."""

    plan: Plan
    title: str = "The plan as a graph"

    def text(self) -> str:
        return f"a graph of {counted(len(self.plan), 'site')}"

    def html(self) -> str:
        rows = _rows(self.plan)
        lines = _lines(rows)
        choices = "".join(map(_size_choice, _SIZES))
        return (
            f'<div class="flow">{_LEGEND}<div class="sizes" role="radiogroup" '
            f'aria-label="size of the graph">{choices}</div>\n'
            f'<div class="scroll tall" tabindex="0">{_svg(rows, lines)}</div></div>'
        )


_LEGEND = (
    '<p class="legend"><span class="int8">●</span> quantized '
    '<span class="int8">○</span> moves integers <span class="float">■</span> float. '
    'A line is a tensor: <span class="int8">━</span> int8, <span class="float">━</span> float; '
    "<b>q</b> and <b>dq</b> are where one is quantized or dequantized.</p>"
)


def _size_choice(percent: int) -> str:
    chosen = " checked" if percent == 100 else ""
    return f'<label><input type="radio" name="size" value="{percent}"{chosen}> {percent} %</label>'


def _rows(plan: Plan) -> list[Row]:
    """The inputs that sites read, the sites, and the output, from top to bottom."""
    inputs = dict.fromkeys(
        name for site in plan for name in site.reads if name.startswith(("input ", "parameter "))
    )
    returned = tuple(site.name for site in plan if site.is_output)
    return [
        *(Row(name, "input", "", "float") for name in inputs),
        *map(_row, plan),
        *([Row(_OUTPUT, "output", "", "float", returned)] if returned else []),
    ]


def _row(site: Site) -> Row:
    domain: Domain = "int8" if site.gives_integers else "float"
    takes: Domain = "int8" if site.mode == "static" else "float"
    words = f"{site.op}  {site.dtypes}"
    return Row(site.name, site.verdict, words, domain, site.reads, site.reason or "", takes)


def _lines(rows: Sequence[Row]) -> dict[str, Line]:
    """A line for each row whose result is read, with lanes that no two of them share."""
    lines: dict[str, Line] = {}
    for place, row in enumerate(rows):
        for name in dict.fromkeys(row.reads):
            if name in lines:  # a plan may be somebody else's: only what is computed before
                lines[name].readers.append(place)
        lines[row.name] = Line(place, row.domain)
    taken: list[int] = []
    for place, row in enumerate(rows):
        read = [lines[name] for name in row.reads if name in lines]
        ending = [line.lane for line in read if line.readers and line.readers[-1] == place]
        taken = [lane for lane in taken if lane not in ending]
        own = lines[row.name]
        own.lane = min(ending, default=_first_free(taken))
        if own.readers:
            taken.append(own.lane)
    return lines


def _first_free(taken: Iterable[int]) -> int:
    used = set(taken)
    return next(lane for lane in range(len(used) + 1) if lane not in used)


def _svg(rows: Sequence[Row], lines: Mapping[str, Line]) -> str:
    lanes = _lanes_beside(rows, lines)
    widths = [
        _x(lane + 1) + _LETTER * len(_label(row)) for lane, row in zip(lanes, rows, strict=True)
    ]
    width, height = round(max(widths, default=0)) + _LANE, _ROW * len(rows) + _DOT
    drawn = [
        *(part for line in lines.values() for part in _drawn_line(rows, lines, line)),
        *(
            part
            for row, lane in zip(rows, lanes, strict=True)
            for part in _drawn_row(row, lines[row.name], lane)
        ),
    ]
    body = "\n".join(drawn)
    return (
        f'<svg role="img" aria-label="{len(rows)} rows of the plan, from the inputs to the output" '
        f'viewBox="0 0 {width} {height}" style="--width: {width}px">\n{body}\n</svg>'
    )


def _lanes_beside(rows: Sequence[Row], lines: Mapping[str, Line]) -> list[int]:
    """By row, the last lane that its words have to stay clear of."""
    last = [lines[row.name].lane for row in rows]
    for line in lines.values():
        for place in range(line.start, max(line.readers, default=line.start) + 1):
            last[place] = max(last[place], line.lane)
    return last


def _drawn_line(rows: Sequence[Row], lines: Mapping[str, Line], line: Line) -> Iterator[str]:
    # the first row that reads the tensor in the other domain
    converted = next((place for place in line.readers if rows[place].takes != line.domain), None)
    x = _x(line.lane)
    if line.readers:
        last = _y(line.readers[-1]) - _ROW // 2
        yield f'<path class="{line.domain}" d="M{x} {_y(line.start)}V{last}"/>'
    for place in line.readers:
        above, end = _y(place) - _ROW // 2, _x(lines[rows[place].name].lane)
        bend = f"M{x} {above}C{x} {_y(place)} {end} {above} {end} {_y(place)}"
        yield f'<path class="{rows[place].takes}" d="{bend}"/>'
    if converted is not None:
        name = rows[line.start].name
        word, verb = ("dq", "dequantized") if line.domain == "int8" else ("q", "quantized")
        y = _y(converted) - _ROW // 2
        yield (
            f'<g class="mark"><title>{escaped(name)} is {verb}</title>'
            f'<rect x="{x - 10}" y="{y - 7}" width="20" height="14" rx="4"/>'
            f'<text x="{x}" y="{y + 4}">{word}</text></g>'
        )


def _drawn_row(row: Row, line: Line, lane: int) -> Iterator[str]:
    x, y = _x(line.lane), _y(line.start)
    hint = f"<title>{escaped(f'{row.name}: {row.why}')}</title>" if row.why else ""
    colour = "int8" if row.kind in ("quantized", "passthrough") else "float"
    if row.kind in ("quantized", "passthrough"):
        shape = f'<circle class="{row.kind}" cx="{x}" cy="{y}" r="{_DOT}"/>'
    else:
        shape = f'<rect x="{x - 5}" y="{y - 5}" width="10" height="10"/>'
    name = escaped(short_name(row.name))
    words = f'<tspan class="words"> {escaped(row.words)}</tspan>' if row.words else ""
    text = f'<text x="{_x(lane) + 18}" y="{y + 4}">{name}{words}</text>'
    yield f'<g class="row {colour}">{hint}{shape}{text}</g>'


def _label(row: Row) -> str:
    return f"{short_name(row.name)} {row.words}"


def _x(lane: int) -> int:
    return _LANE * lane + _LANE // 2


def _y(place: int) -> int:
    return _ROW * place + _ROW // 2
