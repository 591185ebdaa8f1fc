"""A verdict for people: a line per scale, then the answer and the numbers that made it."""

from __future__ import annotations

import math

from megadit.tables import aligned
from megadit.transfer.estimate import ScoreNoise
from megadit.transfer.evidence import ScaleVerdict, power, regret_text
from megadit.transfer.verdict import TransferVerdict

_EDGES = {"inside": "", "edge": "diverges", "open": "grid ends"}


def format_verdict(verdict: TransferVerdict) -> str:
    """The verdict as text: title, table over scales, answer, reasons, what was noticed beside."""
    labels = verdict.evidence.labels
    scale = labels.get("scale", "scale")
    header = (scale, "runs", "best", "score", "optimum (95 %)", "beyond best", "at proxy's best", "regret", "says")
    table = aligned(header, [_row(entry) for entry in verdict.scales], left=len(header))
    lines = [_title(verdict), table, ""]
    if verdict.drift is not None and verdict.drift_interval is not None:
        low, high = verdict.drift_interval
        lines.append(f"drift {verdict.drift:+.2f} octaves per octave (95 % {low:+.2f} to {high:+.2f})")
    if verdict.regret is not None:
        lines.append(f"largest regret {regret_text(verdict.regret, verdict.regret_relative)}")
    lines += [_noise(verdict.evidence.noise), _larger(verdict), ""]
    answer: str = verdict.verdict
    if answer == "transfers" and verdict.best_log2 is not None:
        answer += f", best {power(verdict.best_log2)}"
        if verdict.exceptions:
            answer += f"; exceptions: {', '.join(f'{scale} {value:.12g}' for value in verdict.exceptions)}"
    return "\n".join([*lines, f"verdict: {answer}", *(f"  {reason}" for reason in verdict.reasons)])


def _title(verdict: TransferVerdict) -> str:
    labels = verdict.evidence.labels
    what = f"{labels.get('score', 'score')} against {labels.get('hp', 'hyperparameter')}"
    of = f", variant {labels['variant']}" if labels.get("variant") else ""
    better = "lower" if verdict.evidence.lower_is_better else "higher"
    return f"{labels.get('study') or labels.get('table') or 'samples'}{of}: {what}, {better} is better"


def _row(entry: ScaleVerdict) -> tuple[str, ...]:
    status = "exception" if entry.exception and entry.status != "proxy" else entry.status
    name = f"{entry.scale:.12g}"
    if entry.optimum is None or entry.best_log2 is None or entry.best_score is None:
        return (name, "", "-", "-", "-", "all diverge", "diverges", "infinite", status)
    curve, (low, high) = entry.optimum.curve, entry.optimum.interval
    runs = str(sum(point.runs for point in curve.points))
    edges = [f"{_EDGES[side]} {word}" for side, word in ((curve.low, "below"), (curve.high, "above")) if _EDGES[side]]
    score = entry.score_at_proxy_best
    at_proxy_best = "diverges" if entry.regret == math.inf else "-" if score is None else f"{score:.4g}"
    optimum = f"2^{entry.optimum.at:.2f} ({low:.2f} to {high:.2f})"
    regret = regret_text(entry.regret, entry.regret_relative)
    best = power(entry.best_log2), f"{entry.best_score:.4g}"
    return (name, runs, *best, optimum, ", ".join(edges), at_proxy_best, regret, status)


def _noise(noise: ScoreNoise) -> str:
    if noise.source == "none":
        return "noise of one run: not measurable from one seed and so few values"
    source = {"seeds": "repeated seeds", "residuals": "the residuals"}[noise.source]
    degrees = f"{noise.degrees_of_freedom} degree{'s' if noise.degrees_of_freedom > 1 else ''} of freedom"
    return f"noise of one run {noise.sd:.3g} (from {source}, {degrees})"


def _larger(verdict: TransferVerdict) -> str:
    """Whether more of the scale was better at every value: under muP it should be."""
    if verdict.wider_is_better is None:
        return "larger is better: not measurable"
    if verdict.wider_is_better:
        return "larger is better at every value, noise aside"
    shown = [f"{power(hp)} from {small:.12g} to {large:.12g}" for hp, small, large in verdict.not_better[:4]]
    more = len(verdict.not_better) - len(shown)
    return f"larger is not better at {', '.join(shown)}" + (f" and {more} more" if more else "")
