"""Small files in place of a reader's own: sequences, tables, structures, UniRef and other sources of data."""

from __future__ import annotations

import csv
import random
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from xopen import xopen

from made_structures import folder_of_snakes, letters, mmcif, pdb, snake

P53: Final = "sp|P04637|P53_HUMAN"
"""The id of the first record of ``proteins.fasta``; pages look it up in outputs."""
SHORT: Final = 6
MANY: Final = 400
CLASSES: Final = ("Cytoplasm", "Mitochondrion", "Nucleus")
PARTS: Final = ("train", "train", "train", "validation", "test")
VARIANT: Final = re.compile(r"\b([A-Z])(\d+)(?=[A-Z])")


def write(path: Path, text: str) -> None:
    """Write a text, compressed as the file's suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with xopen(path, "w") as stream:
        stream.write(text)


def records(count: int, seed: int = 0, name: str = "p") -> dict[str, str]:
    """Proteins of 60 to 90 residues, named after ``name``; among ``proteins`` the first is p53."""
    rng = random.Random(seed)
    names = [P53 if not number and name == "proteins" else f"{name}{number}" for number in range(count)]
    return {name: letters(rng.randint(60, 90), seed=seed * 1000 + number) for number, name in enumerate(names)}


def fitted(sequence: str, variants: Iterable[str], offset: int = 1) -> str:
    """The sequence with the residues that names of variants state, so that the variants are variants of it."""
    residues = list(sequence)
    for letter, position in VARIANT.findall(" ".join(variants)):
        if 0 <= int(position) - offset < len(residues):
            residues[int(position) - offset] = letter
    return "".join(residues)


def fasta(path: Path, sequences: Mapping[str, str]) -> None:
    write(path, "".join(f">{name} a protein\n{sequence}\n" for name, sequence in sequences.items()))


def read_first(path: Path) -> str:
    """The first sequence of a FASTA file."""
    with xopen(path) as stream:
        text = str(stream.read())
    return "".join(text.split(">")[1].splitlines()[1:])


def variants(path: Path, sequence: str, *, offset: int = 1, column: str = "mutant") -> None:
    """A table of variants of a protein; names with ``indel`` have deletions, and ``hgvs`` columns their own names."""
    three = dict(zip("ACDEFGHIKLMNPQRSTVWY", _THREE.split(), strict=True))
    rows = []
    for place in range(2, 12):
        old, new = sequence[place], "A" if sequence[place] != "A" else "G"
        number = place + offset
        plain = f"{old}{number}del" if "indel" in path.name and place % 2 else f"{old}{number}{new}"
        rows.append(f"p.{three[old]}{number}{three[new]}" if "hgvs" in column else plain)
    write(path, "\n".join([column, *rows, ""]))


_THREE: Final = "Ala Cys Asp Glu Phe Gly His Ile Lys Leu Met Asn Pro Gln Arg Ser Thr Val Trp Tyr"


def labels(path: Path, column: str, *, numbers: bool) -> None:
    """A table of labelled proteins, each in a part of the data."""
    rows = [["id", "sequence", "set", column]]
    for number, (name, sequence) in enumerate(records(60, seed=3).items()):
        value = f"{sequence.count('L') + number / 60:.2f}" if numbers else CLASSES[number % 3]
        rows.append([name, sequence, PARTS[number % len(PARTS)], value])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)


def labels_of_residues(sequences: Path, classes: Path, mask: Path | None) -> None:
    """FLIP's files: sequences, a class for each residue, and which residues count."""
    proteins = records(30, seed=4)
    fasta(sequences, proteins)
    told = {
        f"{name} SET={'test' if part == 'test' else 'train'} VALIDATION={part == 'validation'}": "".join(
            "HEC"[ord(letter) % 3] for letter in sequence
        )
        for (name, sequence), part in zip(proteins.items(), PARTS * 6, strict=True)
    }
    write(classes, "".join(f">{header}\n{text}\n" for header, text in told.items()))
    if mask is not None:
        write(mask, "".join(f">{name}\n{'1' * len(sequence)}\n" for name, sequence in proteins.items()))


def structures(path: Path) -> None:
    """One structure, or a folder of them."""
    if path.suffix == "" or path.name == "structures":
        folder_of_snakes(path, 26, low=40, high=50)
        return
    chain = snake(letters(45, seed=len(path.name)), width=8, stated=True)
    write(path, mmcif(chain) if ".cif" in path.name else pdb(chain))


def proteingym(folder: Path) -> None:
    """Two deep mutational scans with their table, and one published column."""
    rows = []
    for number in range(2):
        sequence, name = letters(50, seed=number), f"ASSAY{number}_HUMAN"
        scan = [f"{old}{place}A" for place, old in enumerate(sequence, start=1) if old != "A"]
        lines = [f"{mutant},{place / 10},{place % 2}" for place, mutant in enumerate(scan)]
        write(folder / f"{name}.csv", "\n".join(["mutant,DMS_score,DMS_score_bin", *lines, ""]))
        rows.append(f"{name},{name}.csv,P{number},{sequence},Activity,0.3")
    head = "DMS_id,DMS_filename,UniProt_ID,target_seq,coarse_selection_type,spearman ESM2 (8M)"
    write(folder / "reference.csv", "\n".join([head, *rows, ""]))


def flip(folder: Path) -> None:
    """Two of FLIP's tasks, in its layout."""
    rng = random.Random(5)
    proteins = ["".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=24)) for _ in range(30)]
    parts = [PARTS[number % 5] for number in range(30)]
    rows = list(zip(proteins, parts, strict=True))
    text = "".join(
        f">s{n} TARGET={sequence.count('A') + n / 50} SET={'test' if part == 'test' else 'train'} "
        f"VALIDATION={part == 'validation'}\n{sequence}\n"
        for n, (sequence, part) in enumerate(rows)
    )
    write(folder / "gb1" / "two_vs_rest.fasta.gz", text)
    lines = [f"{s},{40 + s.count('A')},{'test' if p == 'test' else 'train'},{p == 'validation'}" for s, p in rows]
    write(folder / "meltome/splits/mixed_split.csv", "\n".join(["sequence,target,set,validation", *lines, ""]))


def clusters(count: int = 60) -> dict[str, dict[str, str]]:
    """UniRef50 clusters with their UniRef90 members, the representative first."""
    proteins = {}
    for number in range(count):
        sequence = letters(60 + number % 20, seed=number)
        proteins[f"C{number}"] = {f"M{number}x{n}": sequence[n:] for n in range(1 + number % 3)}
    return proteins


def uniref50(path: Path) -> None:
    """Representatives, some of them with a word that pages leave out."""
    lines = [
        f">UniRef50_{name} Protein n={len(members)} Tax={'synthetic' if number == 3 else 'Homo sapiens'}\n"
        f"{next(iter(members.values()))}\n"
        for number, (name, members) in enumerate(clusters().items())
    ]
    write(path, "".join(lines))


def uniref90(path: Path) -> None:
    members = (item for group in clusters().values() for item in group.items())
    write(path, "".join(f">UniRef90_{name} Protein n=1\n{sequence}\n" for name, sequence in members))


def mapping(path: Path) -> None:
    """BioNeMo's ``mapping.tsv``, or UniProt's ``idmapping_selected.tab``, whose columns 9 and 10 are used."""
    groups = clusters().items()
    if ".tab" in path.name:
        rows = [
            [*(["" for _ in range(7)]), "", f"UniRef90_{member}", f"UniRef50_{name}", *(["" for _ in range(12)])]
            for name, members in groups
            for member in members
        ]
    else:
        rows = [["UR50_cluster_name", "mapped_id"]]
        rows += [[f"UniRef50_{name}", ",".join(f"UniRef90_{member}" for member in members)] for name, members in groups]
    write(path, "".join("\t".join(row) + "\n" for row in rows))


def bionemo_csv(folder: Path, proteins: Mapping[str, str]) -> None:
    rows = [f"{n},{name},{len(sequence)},{sequence}" for n, (name, sequence) in enumerate(proteins.items())]
    write(folder / "x000.csv", "\n".join(["record_id,record_name,sequence_length,sequence", *rows, ""]))


def bionemo1(csv_folder: Path, members_folder: Path, starts: Path, counts: Path) -> None:
    """BioNeMo 1's divided data: representatives, members, and the two arrays that connect them."""
    groups = clusters()
    firsts = {f"UniRef50_{name}": next(iter(members.values())) for name, members in groups.items()}
    for part, proteins in (("train", firsts), ("val", {"V1": "MKTAYIAK"}), ("test", {"T1": "GDGTQDNL"})):
        bionemo_csv(csv_folder / part, proteins)
    bionemo_csv(members_folder, {name: s for members in groups.values() for name, s in members.items()})
    numbers = np.array([len(members) for members in groups.values()], np.uint64)
    numbers.tofile(counts)
    (np.cumsum(numbers) - numbers).astype(np.uint64).tofile(starts)


def bionemo2(train: Path, valid: Path, database: Path) -> None:
    """BioNeMo 2's clusters and its database of sequences."""
    groups = clusters()
    proteins = {f"UniRef90_{name}": s for members in groups.values() for name, s in members.items()}
    ids = [[f"UniRef90_{name}" for name in members] for members in groups.values()]
    pd.DataFrame({"ur50_id": [names[0] for names in ids[5:]], "ur90_id": ids[5:]}).to_parquet(train)
    pd.DataFrame({"ur50_id": [names[0] for names in ids[:5]]}).to_parquet(valid)
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE protein (id TEXT PRIMARY KEY, sequence TEXT)")
        connection.executemany("INSERT INTO protein VALUES (?, ?)", proteins.items())
    connection.close()


def sequences_for(path: Path, words: Sequence[str], stated: Sequence[str]) -> dict[str, str]:
    """Proteins for a command: one, several or many, as its name and its options need; variants ``stated`` fit them."""
    many = words[0] == "data" or words[0] == "pretrain"
    single = path.name.startswith(("protein.", "p53.")) or "-v" in words
    proteins = records(MANY if many else 1 if single else SHORT, name=path.name.partition(".")[0])
    return {name: fitted(sequence, stated) for name, sequence in proteins.items()}
