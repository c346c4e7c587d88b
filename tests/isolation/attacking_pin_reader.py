"""The process that reads pins as an attacker has it: it does what ``argv`` says, and answers that.

The confinement is the real one, but for what is left out on request.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from isolation.attacking_key_maker import DEEDS
from isolation.attacks import Place, outcome
from keyd.linux import seccomp
from titus_py.commands import pin_reader

if __name__ == "__main__":
    left_out, deeds = json.loads(sys.argv.pop(1))
    if "filter" in left_out:
        seccomp.install = lambda *_: None
    if "all" in left_out:
        pin_reader._confine = lambda _: None

    def attack(descriptor: int) -> list[tuple[str, str, str]]:
        came_of_it = {
            deed: outcome(DEEDS[deed], Place(), [] if parameter is None else [str(parameter)])
            for deed, parameter in deeds.items()
        }
        raise pin_reader.CannotRead(json.dumps(came_of_it))

    pin_reader.keys_of_file = attack
    pin_reader.main()
