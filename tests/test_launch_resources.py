"""Times as people write them, and the site file."""

import pytest

from kd_dist.errors import UserError
from launch.resources import SITE_FILE, Site, minutes_of, read_site


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("2h", 120),
        ("90m", 90),
        ("1d12h", 2160),
        ("45", 45),
        ("01:30:00", 90),
        ("00:00:30", 1),
        ("1-02", 1560),
        ("1-00:30", 1470),
    ],
)
def test_times(text, minutes):
    assert minutes_of(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "0", "2 h", "10:30", "1.5h", "-5", "h2"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UserError, match="is no time; write 2h"):
        minutes_of(text)


def test_the_site_file_as_it_stands_asks_for_nothing():
    assert read_site(SITE_FILE) == Site()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("PARTITION=gpu", "line 2: write NAME="),
        ("SBATCH_PARTITION gpu", "line 2: write NAME="),
        ('SITE_SCRATCH="open', "line 2: No closing quotation"),
        ("SITE_CPUS_PER_TASK=many", "SITE_CPUS_PER_TASK many is no number of cores"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, sentence):
    (tmp_path / "site.conf").write_text(f"# mine\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"site\.conf") as error:
        read_site(tmp_path / "site.conf")
    assert sentence in str(error.value)
