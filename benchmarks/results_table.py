"""Print the tables of docs/results_digits.md from what `timm-rdp compare` wrote.

python benchmarks/results_table.py
"""

import csv
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "compare"
VARIANTS = ("plain", "droppath", "droppath-batch", "droppath-matched", "rdp", "rdp-next")
REFERENCES = ("droppath", "droppath-matched")
GRIDS = {
    "resnet_300": "ResNet, 300 images, 50 epochs",
    "resnet_all": "ResNet, all, 12 epochs",
    "vit_300": "ViT, 300 images, 80 epochs",
    "vit_300_long": "ViT, 300 images, 120 epochs",
    "vit_all": "ViT, all, 40 epochs",
    "resnet_300_plain_residual": "ResNet without zero_init_last, 300 images, 50 epochs",
}


def main() -> None:
    for folder, title in GRIDS.items():
        print(table_of_grid(folder, title))
    print(table_of_search())


def table_of_grid(folder: str, title: str) -> str:
    """Means of every variant at every drop rate, and how RDP differs, as markdown."""
    rows = read(RESULTS / folder)
    variants = [v for v in VARIANTS if any(row["variant"] == v for row in rows)]
    lines = header(f"{title}; drop path", *variants)
    for rate in sorted({r["drop_path"] for r in rows}):
        of_rate = {r["variant"]: r for r in rows if r["drop_path"] == rate}
        means = [mean(of_rate[v]) for v in variants]
        lines.append(line(rate, *means, *differences(of_rate["rdp"])))
    return "\n".join(lines) + "\n"


def table_of_search() -> str:
    """One row for every setting of explore_digits.sh, as markdown."""
    lines = header("setting", "drop path", "droppath", "droppath-matched", "rdp")
    for folder in sorted((RESULTS / "explore").iterdir()):
        of_rate = {r["variant"]: r for r in read(folder)}
        means = [mean(of_rate[v]) for v in ("droppath", "droppath-matched", "rdp")]
        rate = of_rate["rdp"]["drop_path"]
        lines.append(line(folder.name, rate, *means, *differences(of_rate["rdp"])))
    return "\n".join(lines) + "\n"


def read(folder: Path) -> list[dict]:
    with open(folder / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def header(*columns: str) -> list[str]:
    columns = (*columns, *(f"rdp - {reference}" for reference in REFERENCES))
    return [line(*columns), line(*["---"] * len(columns))]


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def mean(row: dict) -> str:
    return f"{float(row['mean']):.2f} ± {float(row['sd']):.2f}"


def differences(row: dict) -> list[str]:
    """Of RDP to its references: the mean and its 95 % interval."""
    values = [
        [float(row[f"{what}_to_{reference}"]) for what in ("difference", "low", "high")]
        for reference in REFERENCES
    ]
    return [f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]" for middle, low, high in values]


if __name__ == "__main__":
    main()
