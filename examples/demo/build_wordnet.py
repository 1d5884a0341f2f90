"""Build wordnet.jsonl: question and answer pairs from WordNet's definitions.

WordNet 3.0 (Princeton University; licence in WORDNET_LICENSE.txt, which must travel with the data) ships as text files;
Debian packages them as `wordnet-base`, in /usr/share/wordnet. The file built here is in the repository, so nobody needs to
run this to run the demo; it is here to show where every line comes from, and gives the same bytes each time.

1. A word's senses are counted in a tagged corpus (`cntlist.rev`): the most frequent sense of each word is taken.
2. Words are ranked by that count and then by name; the first `NUM_PAIRS` are kept. Only lower-case single words.
3. The definition is the gloss up to its first example; glosses that are too short or too long to be one sentence are left out.

Run:  python examples/demo/build_wordnet.py /usr/share/wordnet examples/demo/wordnet.jsonl
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

NUM_PAIRS = 5000
DEFINITION_CHARACTERS = range(16, 121)
"""Most definitions; longer ones would make the demo's batches mostly padding. Chosen, not tuned."""

PARTS_OF_SPEECH = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}
"""Of the digit after `%` in a sense key (5: an adjective satellite, in the adjective file)."""


def read_definitions(folder: Path, part: str) -> dict[tuple[str, int], str]:
    """(lemma, sense number) -> definition, for one part of speech."""
    glosses: dict[str, str] = {}
    for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        offset_and_more, _, gloss = line.partition(" | ")
        glosses[offset_and_more[:8]] = re.split(r";\s*\"", gloss)[0].strip(" ;")
    definitions = {}
    for line in (folder / f"index.{part}").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue
        fields = line.split()
        num_senses = int(fields[2])
        for sense, offset in enumerate(fields[-num_senses:], 1):
            definitions[fields[0], sense] = glosses[offset]
    return definitions


def build_pairs(folder: Path) -> list[dict[str, str]]:
    """The pairs, most frequent word first (rules 1 to 3)."""
    definitions = {part: read_definitions(folder, part) for part in sorted(set(PARTS_OF_SPEECH.values()))}
    best: dict[str, tuple[int, str]] = {}
    for line in (folder / "cntlist.rev").read_text(encoding="utf-8").splitlines():
        sense_key, sense, count = line.split()
        lemma, _, rest = sense_key.partition("%")
        definition = definitions[PARTS_OF_SPEECH[rest[0]]].get((lemma, int(sense)), "")
        if re.fullmatch(r"[a-z]{3,}", lemma) and len(definition) in DEFINITION_CHARACTERS and int(count) > best.get(lemma, (0, ""))[0]:
            best[lemma] = (int(count), definition)
    ranked = sorted(best, key=lambda lemma: (-best[lemma][0], lemma))
    return [{"prompt": f"What does {lemma} mean?\n", "completion": best[lemma][1]} for lemma in ranked[:NUM_PAIRS]]


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text("".join(json.dumps(pair) + "\n" for pair in build_pairs(source)), encoding="utf-8")
