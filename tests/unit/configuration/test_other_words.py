"""What other servers call a setting leads to one that there is."""

from pathlib import Path

import pytest

from titus_py.configuration import load, other_words
from titus_py.configuration.tables import TABLES


@pytest.mark.parametrize("table", other_words._OURS)
def test_each_word_leads_to_a_setting(table: str) -> None:
    known = TABLES[table].model_fields
    for ours in other_words._OURS[table].values():
        setting, _, heading = ours.partition(", in a [[")
        assert setting in (TABLES[heading.partition("]")[0]].model_fields if heading else known)
    assert set(other_words._OURS[table]).isdisjoint(known), "these are settings themselves"


def test_what_is_not_here_is_no_setting() -> None:
    settings = {field for table in TABLES.values() for field in table.model_fields}
    assert settings.isdisjoint(other_words._NOT_HERE)


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("[[vhost]]\nserver_name = 1\n", "server_name: unknown key: here it is sni"),
        ("[[vhost]]\nssl_protocols = 1\n", "ssl_protocols: unknown key: here it is min_version"),
        ("[[vhost]]\nssl-session-tickets = 1\n", "unknown key: sessions are not resumed"),
        ("[[tunnel]]\nsni = 1\n", "sni: unknown key: here it is server_name"),
        ("[metrics]\nlisten = 1\n", "metrics.listen: unknown key: here it is address"),
        ('[[vhost]]\nbackends = ["10.0.0.5:1"]\n', "where connections go is backend, also if"),
    ],
)
def test_the_word_of_here_is_named(tmp_path: Path, text: str, mistake: str) -> None:
    file = tmp_path / "titus.toml"
    file.write_text(text)
    assert any(mistake in str(one) for one in load(file).mistakes)
