"""What a comparison leaves behind: runs.csv, table.csv, table.md, comparison.png."""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_rdp.training.errors import UsageError
from timm_rdp.training.outputs import write_atomically

from .compare_grid import flops_of_epochs, read_grid
from .compare_runs import (
    DIVERGED,
    DONE,
    FAILED,
    MATCHED,
    VARIANTS,
    Run,
    all_runs,
    read_record,
    summary_rows,
)
from .compare_stats import REFERENCES, Comparison, Mean, compare, mean_of, p_text, sentences
from .figures import MARKERS, TONES, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OUTPUTS = ("runs.csv", "table.csv", "table.md", "comparison.png")
_TONE_OF = dict(zip(VARIANTS, (5, 1, 2, 3, 0, 4), strict=True))
MEASURED = ("top1", "eval_loss", "train_loss")


@dataclass
class Result:
    """What a run came to; numbers that it did not come to are None."""

    run: Run
    status: str
    epochs: int
    top1: float | None
    eval_loss: float | None
    train_loss: float | None
    seconds: float | None
    flops: float | None
    error: str


@dataclass
class Row:
    """One variant at one drop rate, which for plain is the section's that it is shown in."""

    drop_path: float
    variant: str
    results: list[Result]
    top1: Mean
    seconds: float | None
    flops: float | None
    relative: float | None  # flops over those of droppath
    comparisons: dict[str, Comparison]

    def count(self, status: str) -> int:
        return sum(r.status == status for r in self.results)

    @property
    def unfinished(self) -> int:
        return len(self.results) - sum(self.count(s) for s in (DONE, DIVERGED, FAILED))


def write_report(output: Path, pick: str = "last") -> str:
    """Write the four outputs from what a folder holds, finished or not, and return what it says.

    Args:
        output: the folder of the comparison.
        pick: "last" epoch of each run, or "best".

    Raises:
        UsageError: there is no comparison, or no run that has begun.
    """
    grid = read_grid(output)
    if grid is None:
        raise UsageError(f"--report {output}: holds no comparison (no grid.json); check the folder")
    results = [_result(output, run, grid, pick) for run in all_runs(output)]
    if not results:
        raise UsageError(f"--report {output}: holds no run yet; start it without --report")
    rows, comparisons = tabulate(results, grid)
    notes = _notes(rows, comparisons, grid, pick)
    said = _said(rows, comparisons)
    _write_csv(output / "runs.csv", RUN_COLUMNS, (_run_cells(r) for r in results))
    _write_csv(output / "table.csv", *_table_csv(rows))
    text = "\n".join([*_table_md(rows, grid), *said, "", *notes]) + "\n"
    write_atomically(str(output / "table.md"), text.encode())
    image = io.BytesIO()
    save(draw(rows, grid, pick), image)
    write_atomically(str(output / "comparison.png"), image.getvalue())
    return "\n".join([*said, f"{', '.join(OUTPUTS)} are in {output}"])


def _result(output: Path, run: Run, grid: dict[str, Any], pick: str) -> Result:
    record = read_record(output, run)
    measured: dict[str, float | None] = dict.fromkeys(MEASURED)
    if record["status"] == DONE:
        rows = summary_rows(output / "runs" / run.name)
        row = max(rows, key=lambda r: float(r["eval_top1"])) if pick == "best" else rows[-1]
        columns = zip(MEASURED, ("eval_top1", "eval_loss", "train_loss"), strict=True)
        measured = {name: float(row[column]) for name, column in columns}
    return Result(
        run=run,
        status=record["status"],
        epochs=record["epochs"],
        **measured,
        seconds=record["seconds"],
        flops=flops_of_epochs(grid, run.variant, run.drop_path, record["epochs"]),
        error=record["error"],
    )


def tabulate(results: Sequence[Result], grid: dict[str, Any]) -> tuple[list[Row], list[Comparison]]:
    """A row per variant and drop rate, and every comparison among them."""
    rates = sorted({r.run.drop_path for r in results if r.run.drop_path is not None}) or [0.0]
    cells: dict[tuple[str, float | None], list[Result]] = {}
    for result in results:
        cells.setdefault((result.run.variant, result.run.drop_path), []).append(result)
    scores = {
        cell: {r.run.seed: r.top1 for r in own if r.status == DONE} for cell, own in cells.items()
    }
    comparisons = compare(scores, rates)
    rows = []
    for rate in rates:
        usual = None
        section = []
        for variant in VARIANTS:
            own = cells.get((variant, None if variant == "plain" else rate))
            if own is None:
                continue
            done = [r for r in own if r.status == DONE]
            flops = done[0].flops if done else None
            seconds = [r.seconds for r in done if r.seconds is not None]
            if variant == "droppath":
                usual = flops
            section.append(
                Row(
                    drop_path=rate,
                    variant=variant,
                    results=own,
                    top1=mean_of([r.top1 for r in done]),
                    seconds=statistics.median(seconds) if seconds else None,
                    flops=flops,
                    relative=None,
                    comparisons={
                        c.reference: c
                        for c in comparisons
                        if (c.drop_path, c.variant) == (rate, variant)
                    },
                )
            )
        for row in section:
            row.relative = row.flops / usual if row.flops and usual else None
        rows += section
    return rows, comparisons


RUN_COLUMNS = (
    "variant", "drop_path", "seed", "status", "epochs", "top1", "eval_loss", "train_loss",
    "seconds", "flops", "error",
)  # fmt: skip


def _run_cells(r: Result) -> tuple:
    rate = 0.0 if r.run.drop_path is None else r.run.drop_path
    numbers = (r.top1, r.eval_loss, r.train_loss, r.seconds, r.flops)
    return (r.run.variant, rate, r.run.seed, r.status, r.epochs, *map(_cell, numbers), r.error)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.10g}"


def _table_csv(rows: Sequence[Row]) -> tuple[list[str], list[list]]:
    header = ["drop_path", "variant", "epochs", "seeds", "diverged", "failed", "unfinished"]
    header += ["mean", "sd", "low", "high"]
    for reference in REFERENCES:
        columns = ("pairs", "difference", "sd", "low", "high", "p", "p_corrected")
        header += [f"{column}_to_{reference}" for column in columns]
    header += ["seconds", "flops", "relative_flops"]
    table = []
    for row in rows:
        counts = (row.count(DIVERGED), row.count(FAILED), row.unfinished)
        cells = [row.drop_path, row.variant, _epochs(row), row.top1.n, *counts]
        cells += map(_cell, (row.top1.mean, row.top1.sd, row.top1.low, row.top1.high))
        for reference in REFERENCES:
            c = row.comparisons.get(reference)
            if c is None:
                cells += [""] * 7
                continue
            d = c.difference
            numbers = (d.mean, d.sd, d.low, d.high, c.p, c.corrected)
            cells += [d.n, *map(_cell, numbers)]
        cells += map(_cell, (row.seconds, row.flops, row.relative))
        table.append(cells)
    return header, table


def _epochs(row: Row) -> int | str:
    done = [r.epochs for r in row.results if r.status == DONE]
    return done[0] if done else ""


def _table_md(rows: Sequence[Row], grid: dict[str, Any]) -> list[str]:
    options = grid["options"]
    data = options["data_dir"] or options["dataset"] or "the demo (handwritten digits)"
    lines = [f"# {options['model']} on {data}"]
    against = [r for r in REFERENCES if any(r in row.comparisons for row in rows)]
    heading = ["variant", "epochs", "seeds", "top-1, %", "sd", "95 % interval"]
    for reference in against:
        heading += [f"minus {reference}", "p", "corrected"]
    heading += ["median time", "FLOPs", "relative"]
    for rate in sorted({row.drop_path for row in rows}):
        lines += ["", f"## Drop path {rate:g}", "", _line(heading), _line(["---"] * len(heading))]
        for row in rows:
            if row.drop_path != rate:
                continue
            m = row.top1
            cells = [row.variant, str(_epochs(row)), _seeds(row)]
            cells += [_number(m.mean, ".2f"), _number(m.sd, ".2f"), _interval(m, ".2f")]
            for reference in against:
                c = row.comparisons.get(reference)
                if c is None:
                    cells += ["", "", ""]
                    continue
                d = c.difference
                paired = "" if d.n == row.top1.n else f" ({d.n} pairs)"
                cells.append(f"{_number(d.mean, '+.2f')} {_interval(d, '+.2f')}{paired}".strip())
                cells += [
                    "" if p is None else p_text(p)[2:].strip("= ") for p in (c.p, c.corrected)
                ]
            cells += [_time(row.seconds), _number(row.flops, ".3g"), _number(row.relative, ".2f")]
            lines.append(_line(cells))
    return [*lines, ""]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _interval(m: Mean, form: str) -> str:
    if m.n == 1:
        return "(one seed: none)"
    return "" if m.low is None else f"[{m.low:{form}}, {m.high:{form}}]"


def _seeds(row: Row) -> str:
    rest = [(row.count(DIVERGED), "diverged"), (row.count(FAILED), "failed")]
    rest.append((row.unfinished, "unfinished"))
    return ", ".join([str(row.top1.n), *(f"{n} {what}" for n, what in rest if n)])


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _said(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> list[str]:
    said = sentences(comparisons)
    if not said:
        said = ["There are no runs of droppath to compare with: add droppath to --variants."]
    missing = []
    for row in rows:
        rest = _seeds(row).split(", ", 1)[1:]
        place = row.variant if row.variant == "plain" else f"{row.variant} at {row.drop_path:g}"
        if rest and f"{place}: {rest[0]}" not in missing:
            missing.append(f"{place}: {rest[0]}")
    if missing:
        said.append(f"Runs that are not in the means: {'; '.join(missing)}.")
    return [f"- {line}" for line in said]


def _notes(
    rows: Sequence[Row], comparisons: Sequence[Comparison], grid: dict[str, Any], pick: str
) -> list[str]:
    tests = sum(c.p is not None for c in comparisons)
    epoch = (
        "after the last epoch, so that nothing is picked on it"
        if pick == "last"
        else "in the best epoch of each run: picked on that very set, and so flattering to all"
    )
    notes = [
        f"Top-1 is in per cent on the validation set, {epoch}. Differences are in points, paired "
        "by seed: the same initial weights and the same order of the data.",
        "Intervals are 95 %, from the t distribution, not corrected for their number. p is that of "
        "the two-sided paired t test (scipy.stats.ttest_rel); corrected p is after Holm's "
        f"correction over the {tests} {'test' if tests == 1 else 'tests'} of this table, and below "
        "0.05 counts as a difference.",
        "FLOPs are those of forward and backward passes, counted operation by operation and "
        "averaged over drop masks, for all epochs; relative is to droppath. Dropped paths are not "
        "run by rdp and droppath-batch, but are by timm's droppath. Time is the median run's, "
        "training and validation without the start of the process.",
    ]
    if any(row.variant == MATCHED for row in rows):
        what = {
            "flops": "by counted FLOPs",
            "updates": "by optimizer updates",
            "time": "by measured time",
        }
        notes.append(
            "droppath-matched is droppath with as many --epochs as cost what rdp costs, "
            f"{what[grid['match']]}, and never fewer than the others."
        )
    return [line for note in notes for line in (note, "")][:-1]


def _write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(str(path), text.getvalue().encode())


def draw(rows: Sequence[Row], grid: dict[str, Any], pick: str) -> "Figure":
    """Accuracy against compute: a dot a seed, the mean with its interval; a panel a drop rate."""
    rates = sorted({row.drop_path for row in rows})
    columns = min(len(rates), 2)
    lines = -(-len(rates) // columns)
    figure = new_figure(height=3.3 * lines + 0.9, width=8.0 if columns > 1 else 6.4)
    grid_of_axes = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    by_flops = all(row.relative is not None for row in rows if row.top1.n)
    labelled = {}
    for rate, axes in zip(rates, grid_of_axes, strict=False):
        section = [row for row in rows if row.drop_path == rate and row.top1.n]
        cost = [row.relative if by_flops else float(_epochs(row)) for row in section]
        for row, place in zip(section, _side_by_side(cost), strict=True):
            labelled |= _draw_variant(axes, row, place)
        missing = [
            f"{row.variant}: {_seeds(row).split(', ', 1)[1]}"
            for row in rows
            if row.drop_path == rate and len(row.results) != row.top1.n
        ]
        if missing:
            axes.text(0.02, 0.02, "\n".join(missing), transform=axes.transAxes, fontsize=7)
        axes.set_title(f"drop path {rate:g}", fontsize=9)
        axes.set_xlabel("FLOPs of the run, droppath = 1" if by_flops else "epochs")
        axes.grid(alpha=0.3)
        axes.margins(x=0.08)
    for axes in grid_of_axes[len(rates) :]:
        axes.set_visible(False)
    _limit_height(grid_of_axes[0], [row for row in rows if row.top1.n])
    for axes in grid_of_axes[: len(rates) : columns]:
        axes.set_ylabel(f"top-1, {pick} epoch (%)")
    if labelled:
        figure.legend(
            labelled.values(), labelled.keys(), loc="outside lower center", ncols=3, fontsize=8
        )
    figure.suptitle(
        f"{grid['options']['model']}: a dot a seed; the mean and its 95 % interval", fontsize=11
    )
    return figure


def _draw_variant(axes: "Axes", row: Row, place: float) -> dict[str, Any]:
    from matplotlib.transforms import ScaledTranslation

    index = VARIANTS.index(row.variant)
    colour, marker = TONES[_TONE_OF[row.variant]], MARKERS[index]
    values = [r.top1 for r in row.results if r.status == DONE]
    dots = dict(linestyle="", marker=marker, alpha=0.5, markersize=4.5, markeredgewidth=0)
    axes.plot([place] * len(values), values, color=colour, **dots)
    half = None if row.top1.low is None else row.top1.high - row.top1.mean
    # The mean stands beside its dots, a few points to the right.
    beside = axes.transData + ScaledTranslation(7 / 72, 0, axes.figure.dpi_scale_trans)
    handle = axes.errorbar(
        place,
        row.top1.mean,
        half,
        color=colour,
        marker=marker,
        markersize=7,
        capsize=3,
        linewidth=1.2,
        transform=beside,
    )
    return {row.variant: handle}


def _limit_height(axes: "Axes", rows: Sequence[Row]) -> None:
    """Where there are so few seeds that intervals dwarf the dots, the dots decide."""
    values = [r.top1 for row in rows for r in row.results if r.status == DONE]
    if not values:
        return
    edges = [e for row in rows for e in (row.top1.low, row.top1.high) if e is not None]
    span = max(values) - min(values) or 1.0
    low = max(min([*values, *edges]), min(values) - 1.5 * span)
    high = min(max([*values, *edges]), max(values) + 1.5 * span)
    margin = 0.06 * (high - low or 1.0)
    axes.set_ylim(low - margin, high + margin)


def _side_by_side(places: Sequence[float]) -> list[float]:
    """Move places that would lie on each other apart, evenly around where they are."""
    span = max(places) - min(places) if places else 0.0
    near = 0.05 * (span or 1.0)
    order = sorted(range(len(places)), key=lambda i: (places[i], i))
    groups: list[list[int]] = []
    for i in order:
        if groups and places[i] - places[groups[-1][-1]] < near:
            groups[-1].append(i)
        else:
            groups.append([i])
    moved = list(places)
    for group in groups:
        middle = statistics.fmean(places[i] for i in group)
        for rank, i in enumerate(group):
            if len(group) > 1:
                moved[i] = middle + (rank - (len(group) - 1) / 2) * near
    return moved
