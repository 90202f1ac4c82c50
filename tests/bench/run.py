"""The benchmark: `make bench`, or in pieces, `python tests/bench/run.py --models minilm`."""

import argparse
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import measure
import tables
from models import MODELS

from tuner import AccuracyGoal, SearchSpace, TuningConfig

STRATEGIES = ("auto", "tpe", "random")
SPACES = ("int8", "mixed-int")
AUTO_TRIALS = 50
SAMPLER_TRIALS = 100


def main() -> None:
    """Run what the arguments ask for, and write the table."""
    arguments = _parser().parse_args()
    if not arguments.render_only:
        for name in arguments.models:
            task = MODELS[name]()
            for config in _configs(arguments):
                row = measure.run(name, task, config).to_dict()
                tables.append(row, tables.RUNS)
                print(
                    f"{name} {row['space']} {row['strategy']}: BOPs {row['bops_ratio']:.2%} after "
                    f"{row['evaluations']} evaluations, {row['wall_s']:.0f} s",
                    flush=True,
                )
    tables.render()


def _configs(arguments: argparse.Namespace) -> Iterator[TuningConfig]:
    """Yield the runs of one model: every space with `auto`, the samplers in `mixed-int`."""
    plain = arguments.without_repairs
    for space in arguments.spaces:
        for strategy in arguments.strategies:
            if strategy == "auto" or space == "mixed-int":
                yield TuningConfig(
                    goal=AccuracyGoal(max_drop=arguments.max_drop),
                    space=SearchSpace(preset=space, **({"repairs": ()} if plain else {})),
                    strategy=strategy,
                    max_trials=arguments.max_trials or _max_trials(strategy),
                    seed=arguments.seed,
                )


def _max_trials(strategy: str) -> int:
    return AUTO_TRIALS if strategy == "auto" else SAMPLER_TRIALS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=tuple(MODELS))
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--spaces", nargs="+", default=SPACES)
    parser.add_argument("--without-repairs", action="store_true", help="in the search space")
    parser.add_argument("--max-trials", type=int, help="instead of the usual number")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--render-only", action="store_true", help="write RESULTS.md only")
    return parser


if __name__ == "__main__":
    main()
