import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wdmoe.errors import ConfigError
from wdmoe.units import format_quantity, parse_quantity


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("20MHz", "frequency", 20e6),
        ("2.4 GHz", "frequency", 2.4e9),
        ("150ms", "time", 0.15),
        ("1e2us", "time", 1e-4),
        ("2min", "time", 120),
        (".5h", "time", 1800),
        ("2GiB", "size", 2 << 30),
        ("2GB", "size", 2e9),
        ("0", "size", 0),
        ("20Mbit/s", "rate", 20e6),
        ("30dBm", "power", 1.0),
        ("3dBW", "power", 1.9952623149688795),
        ("200mW", "power", 0.2),
        ("-90dB", "gain", 1e-9),
        ("-174dBm/Hz", "noise density", 10**-17.4 * 1e-3),
    ],
)
def test_reads_what_people_type(text, dimension, value):
    assert parse_quantity(text, dimension) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "dimension", "says"),
    [
        ("20", "frequency", "unit is missing"),
        ("20mhz", "frequency", "'mhz'"),  # case matters: mW is not MW
        ("fast", "rate", "20Mbit/s"),
        ("", "time", "150ms"),
        ("20MHz", "time", "'MHz'"),
        ("-5ms", "time", "not negative"),
        ("nan s", "time", "150ms"),
        ("inf", "time", "150ms"),
        ("1e400s", "time", "finite"),
        ("1e9dBm", "power", "finite"),
        ("5", "gain", "-90dB"),
    ],
)
def test_refuses_in_one_line_with_a_right_example(text, dimension, says):
    with pytest.raises(ConfigError, match=says) as caught:
        parse_quantity(text, dimension)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "dimension", "text"),
    [
        (20e6, "frequency", "20 MHz"),
        (0.15, "time", "150 ms"),
        (5e-7, "time", "0.5 us"),
        (90, "time", "90 s"),
        (1.5 * 2**30, "size", "1.5 GiB"),
        (1023 * 1024, "size", "1023 KiB"),
        (0, "size", "0 B"),
        (20e6, "rate", "20 Mbit/s"),
        (0.2, "power", "200 mW"),
        (1e-9, "gain", "-90 dB"),
        (10**-17.4 * 1e-3, "noise density", "-174 dBm/Hz"),
        (0, "gain", "-inf dB"),
    ],
)
def test_writes_for_people(value, dimension, text):
    assert format_quantity(value, dimension) == text


@given(st.floats(1e-6, 1e12), st.sampled_from(["frequency", "time", "size", "rate", "power", "gain"]))
def test_what_is_written_reads_back(value, dimension):
    smallest = {"time": 1e-6, "power": 1e-3, "gain": 0}.get(dimension, 1)
    back = parse_quantity(format_quantity(value, dimension), dimension)
    assert math.isclose(back, value, rel_tol=0.02, abs_tol=smallest)


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused(text):
    try:
        value = parse_quantity(text, "time")
    except ConfigError:
        return
    assert 0 <= value < math.inf
