"""All benchmarks, one after the other; what is there already is not repeated.

    python benchmarks/all.py --quick     # few steps, to see that all works: ten minutes
    python benchmarks/all.py --fresh     # measures anew: about five hours on two cores; stop it and start it at will
    python benchmarks/all.py --report    # tables and pictures of the results in the repository

Every benchmark starts no further run after two hours: what is left then, the next start runs. Options are
handed on to every part; README.md in this folder has the parts one by one.
"""

import signal
import subprocess
import sys

from runs import ROOT

COMPARISON = ("learning", "adaptation", "scaling", "goals")  # of all scripts; what asks for time


def main(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    codes: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for name in COMPARISON:
        print(f"\n## benchmarks/{name}.py", flush=True)
        with subprocess.Popen([sys.executable, f"benchmarks/{name}.py", *words], cwd=ROOT) as process:
            try:
                codes.append(process.wait())
            finally:  # also when this program is killed
                process.terminate()
        if codes == [2]:  # options that are not understood
            break
    return max(codes, key=abs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
