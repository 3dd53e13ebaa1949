"""A process that records and compiles, without Triton's interpreter: a line of JSON in, one out."""

import dataclasses
import json
import os
import sys
from typing import Any

from ..ops._launch import Device
from .devices import target_like, target_of
from .record import Specialisation, pick, specialisations


def answer(request: dict[str, Any]) -> Any:
    if "device" in request:
        target = target_like(Device(**request["device"]))
    else:
        target = target_of(request["target"])
    if "op" in request:
        found = specialisations(request["op"], target, request["configs"])
        return [dataclasses.asdict(spec) for spec in pick(found, request["limit"])]
    from .binary import facts

    return dataclasses.asdict(facts(Specialisation.load(request["compile"]), target))


def main() -> None:
    # compilers print; the answers go where nobody else writes
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
