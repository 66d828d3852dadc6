"""`samray.label` with the stand-in labeler as a process of its own, for tests that stop or kill it.

python -m tests.support.drive.py INPUT OUTPUT PACE [section.key=value ...]
"""

from __future__ import annotations

import functools
import signal
import sys

from samray.config import load_config
from samray.pipeline.report import print_report
from samray.pipeline.run import label_with
from tests.support import standin


def main(input: str, output: str, pace: str, *overrides: str) -> int:
    # Any file serves as checkpoint: the stand-in loads none, and the run only wants its hash. There is one thread in
    # all, so that a machine of many cores is not done before it is stopped.
    base = [f"model.checkpoint={__file__}", "output.images_per_shard=4"]
    base += ["cluster.max_actors=1", "cluster.num_cpus_per_actor=1"]
    config = load_config(None, None, [*base, *overrides])
    make_labeler = functools.partial(standin.make_labeler, pace=standin.Pace.parse(pace))
    try:
        report = label_with(input, output, config, make_labeler=make_labeler)
    except KeyboardInterrupt:  # as the command line does
        print("interrupted", file=sys.stderr)
        return 130
    print_report(report)
    return report.exit_code


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as `samray.__main__` does
    sys.exit(code)
