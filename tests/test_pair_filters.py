"""The filters of pair preparation, each by itself: which copy stays, and what counts as another language."""

import numpy as np
from pair_data import AMONG, FACTS, FOREIGN, document

from training.pair_filters import _SIGNATURE, PairLanguageFilter, copies, has_stop_words, likeliest_other
from training.pair_recipe import PairLanguage


def test_copies_are_all_but_the_first_of_source_and_text():
    draw = np.random.default_rng(3)
    signatures = np.empty(500, _SIGNATURE)
    for name, high in (("key", 60), ("source", 3), ("text", 4)):
        signatures[name] = draw.integers(high, size=500)
    signatures["row"], task = draw.permutation(500), draw.integers(5, size=500)
    first = {}
    for index, (key, source, text, row) in enumerate(signatures.tolist()):
        place = (source, text, task[index], row)
        first[key] = min(first.get(key, (place, index)), (place, index))
    assert set(np.flatnonzero(~copies(signatures, task))) == {index for _, index in first.values()}
    assert not copies(signatures[:0], task[:0]).any()


SHORT = [
    ("banteng", "wild ox of the Malay Archipelago"),
    ("vicar apostolic", "a titular Roman Catholic bishop in a non-Catholic area"),
    ("libsqlite3-dev", "SQLite 3 development files"),
    ("homer", "hit a home run"),
    ("GDP of Chile", "2024: $8,500; 2023: $8,200"),
    ("3 + 4", "7"),
]
FOREIGN_SHORT = [
    ("Datei nicht gefunden", "Die Datei konnte nicht geöffnet werden"),
    ("Fehler beim Lesen", "ungültiges Argument für die Option"),
    ("fichier introuvable", "le fichier ne peut pas être ouvert"),
    ("archivo no encontrado", "no se puede abrir el archivo"),
]


def test_short_english_stays_and_short_german_goes():
    rule = PairLanguageFilter(PairLanguage(among=AMONG))
    assert [rule.filter(document(*pair)) for pair in SHORT] == [True] * len(SHORT)
    removed = [rule.filter(document(*pair)) for pair in FOREIGN_SHORT]
    assert removed == [(False, "de"), (False, "de"), (False, "fr"), (False, "es")]
    german, english = FOREIGN["letters"][0][1], FACTS["notes"][0][1]
    assert rule.filter(document(english[:20], german * 20)) == (False, "de")  # an English title does not save it
    both = PairLanguage(keep=["en", "de"], among=AMONG)
    assert PairLanguageFilter(both).filter(document(*FOREIGN_SHORT[0])) is True


def test_what_stop_words_let_pass_lingua_would_keep():
    language = PairLanguage(among=AMONG)
    texts = [f"{q}\n{p}" for pairs in FACTS.values() for q, p in pairs]
    passed = [text for text in texts if has_stop_words(text)]
    assert 4 <= len(passed) < len(texts)  # both ways are taken
    assert all(likeliest_other(text, language)[1] < language.sure for text in texts)
    assert not any(has_stop_words(f"{q}\n{p}") for q, p in [*FOREIGN_SHORT, *FOREIGN["letters"], *FOREIGN["notes"]])
