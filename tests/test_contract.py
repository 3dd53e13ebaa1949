"""Every check of the contract, on every op."""

import pytest

from fastdl.contract import SPECS
from fastdl.contract.checks import CHECKS, cases_of


def params():
    for check in CHECKS.values():
        for spec in SPECS.values():
            for case in cases_of(spec, check.scope) if check.scope != "op" else [None]:
                for dtype in check.dtypes or [None]:
                    marks = [pytest.mark.slow] if check.is_slow(case, dtype) else []
                    words = [spec.name, check.name, case and case.name, dtype and str(dtype)[6:]]
                    yield pytest.param(
                        check, spec, case, dtype, id="-".join(filter(None, words)), marks=marks
                    )


@pytest.mark.parametrize(("check", "spec", "case", "dtype"), list(params()))
def test_contract(check, spec, case, dtype, device):
    check.function(*filter(lambda a: a is not None, (spec, case, device, dtype)))
