"""What is filtered of torch's warnings, where, and for how long."""

from __future__ import annotations

import warnings

import pytest
from nets import NETS
from runs import STATIC, silent

import qrecipe
from qrecipe._torch_ao import quiet

NOTICE = "torch.ao.quantization is deprecated and will be removed"


def test_notices_are_held_back_inside_and_shown_again_behind_it():
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as held_back:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn(NOTICE, DeprecationWarning, stacklevel=1)
    assert held_back == []
    assert warnings.filters == before
    with pytest.warns(DeprecationWarning, match=NOTICE):
        warnings.warn(NOTICE, DeprecationWarning, stacklevel=1)


def test_filters_are_as_before_behind_an_error_too():
    before = list(warnings.filters)
    with pytest.raises(ZeroDivisionError), quiet():
        raise ZeroDivisionError
    assert warnings.filters == before


def test_other_warnings_pass():
    with pytest.warns(UserWarning, match="of the model's own"), quiet():
        warnings.warn("of the model's own", UserWarning, stacklevel=1)


def test_quantizing_leaves_the_filters_of_the_process_alone():
    before, net = list(warnings.filters), NETS["mlp"]
    qrecipe.quantize(net.model(), STATIC, net.batches(), progress=silent)
    assert warnings.filters == before
