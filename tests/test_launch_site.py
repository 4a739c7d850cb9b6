"""Times as people write them, and the site file."""

import pytest

from kd_dist.errors import UserError
from launch.site import SITE_FILE, Site, minutes_of, read_site


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("2h", 120),
        ("90m", 90),
        ("1d12h", 2160),
        ("45", 45),
        ("01:30:00", 90),
        ("00:00:30", 1),
        ("1-00:30:00", 1470),
    ],
)
def test_times(text, minutes):
    assert minutes_of(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "0", "2 h", "10:30", "1.5h", "-5", "h2", "1-02"])
def test_an_invalid_time_is_refused(text):
    with pytest.raises(UserError, match="Invalid --time"):
        minutes_of(text)


def test_the_site_file_as_it_stands_asks_for_nothing():
    assert read_site(SITE_FILE) == read_site(None) == Site()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("PARTITION=gpu", "invalid PARTITION=gpu; write NAME="),
        ("SBATCH_PARTITION gpu", "invalid SBATCH_PARTITION; write NAME="),
        ('SITE_SCRATCH="open', "No closing quotation; put each value"),
        ("SITE_CPUS_PER_TASK=many", "invalid SITE_CPUS_PER_TASK many; write a number"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, sentence):
    (tmp_path / "site.conf").write_text(f"# mine\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"site\.conf") as error:
        read_site(tmp_path / "site.conf")
    assert sentence in str(error.value)
