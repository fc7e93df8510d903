"""Promises that a run is read against. They are information: a slow machine does not fail the run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """One promise: a figure made of rows, and where it should lie."""

    text: str
    limit: float
    unit: str
    is_ceiling: bool
    figure: float | None

    @property
    def holds(self) -> bool | None:
        """None: the rows for it were not run."""
        if self.figure is None:
            return None
        return self.figure <= self.limit if self.is_ceiling else self.figure >= self.limit


def show(bars: list[Bar]) -> None:
    print("\nBars (for information):")
    for bar in bars:
        print(f"  {mark(bar)} {bar.text}")


def mark(bar: Bar) -> str:
    sign = "at most" if bar.is_ceiling else "at least"
    verdict = {True: "pass", False: "FAIL", None: "----"}[bar.holds]
    figure = "not run" if bar.figure is None else f"{bar.figure:.2f}{bar.unit}"
    return f"{verdict}  {figure:>9}  ({sign} {bar.limit:g}{bar.unit})"


def sentence(bars: list[Bar]) -> str:
    """Which promises a run did not keep, and which it did not look at; for the README."""
    missed = [
        f"{bar.text} {bar.figure:.2f}{bar.unit} "
        f"(wanted: at {'most' if bar.is_ceiling else 'least'} {bar.limit:g}{bar.unit})"
        for bar in bars
        if bar.holds is False
    ]
    text = "Targets that this run misses: " + ("; ".join(missed) or "none") + "."
    if unknown := [bar.text for bar in bars if bar.holds is None]:
        text += " Not measured: " + "; ".join(unknown) + "."
    return text
