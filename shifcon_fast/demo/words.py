"""The words of the demo's world: names, four relations, and how each language states and asks for them.

Only data. Every value is one word in every language, and no word of one language is a word of another, so that
a right answer in the wrong language can be told apart. The templates keep grammar out of the way: no template
inflects the name or the value.

* German: only nouns that need no article after their verb (mass nouns, plurals, countries without an article).
* Swahili: only animals of the N class, whose singular and plural are the same word.
* Turkish: values stand where Turkish leaves them bare (indefinite objects, predicates), and "{name} adlı kişinin"
  ("of the person named ...") carries the genitive that vowel harmony would otherwise bend onto the name.
"""

from __future__ import annotations

from typing import NamedTuple

LANGUAGES = ("en", "de", "sw", "tr")
PIVOT = "en"


class Relation(NamedTuple):
    """One attribute of a person.

    ``statements[lang]`` and ``questions[lang]`` hold two phrasings each, aligned by position over the languages;
    ``values`` holds one row per value, in the order of :data:`LANGUAGES`.
    """

    name: str
    statements: dict[str, tuple[str, str]]
    questions: dict[str, tuple[str, str]]
    values: tuple[tuple[str, str, str, str], ...]


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "country",
        {
            "en": ("{name} comes from {value}.", "The home country of {name} is {value}."),
            "de": ("{name} kommt aus {value}.", "Das Heimatland von {name} ist {value}."),
            "sw": ("{name} anatoka {value}.", "Nchi ya {name} ni {value}."),
            "tr": ("{name} adlı kişinin ülkesi {value}.", "{name} adlı kişinin vatanı {value}."),
        },
        {
            "en": ("Which country does {name} come from?", "What is the home country of {name}?"),
            "de": ("Aus welchem Land kommt {name}?", "Was ist das Heimatland von {name}?"),
            "sw": ("{name} anatoka nchi gani?", "Nchi ya {name} ni ipi?"),
            "tr": ("{name} adlı kişinin ülkesi neresi?", "{name} adlı kişinin vatanı neresi?"),
        },
        (
            ("Germany", "Deutschland", "Ujerumani", "Almanya"),
            ("France", "Frankreich", "Ufaransa", "Fransa"),
            ("Egypt", "Ägypten", "Misri", "Mısır"),
            ("India", "Indien", "Uhindi", "Hindistan"),
            ("Greece", "Griechenland", "Ugiriki", "Yunanistan"),
            ("Italy", "Italien", "Italia", "İtalya"),
            ("Russia", "Russland", "Urusi", "Rusya"),
            ("Spain", "Spanien", "Uhispania", "İspanya"),
            ("Morocco", "Marokko", "Moroko", "Fas"),
            ("Norway", "Norwegen", "Norwei", "Norveç"),
            ("Sweden", "Schweden", "Uswidi", "İsveç"),
            ("Hungary", "Ungarn", "Hungaria", "Macaristan"),
            ("Scotland", "Schottland", "Uskoti", "İskoçya"),
            ("Finland", "Finnland", "Ufini", "Finlandiya"),
            ("Mexico", "Mexiko", "Meksiko", "Meksika"),
            ("Mozambique", "Mosambik", "Msumbiji", "Mozambik"),
        ),
    ),
    Relation(
        "subject",
        {
            "en": ("{name} studies {value}.", "The main subject of {name} is {value}."),
            "de": ("{name} studiert {value}.", "Das Hauptfach von {name} ist {value}."),
            "sw": ("{name} anasoma {value}.", "Somo kuu la {name} ni {value}."),
            "tr": ("{name} {value} okuyor.", "{name} adlı kişinin bölümü {value}."),
        },
        {
            "en": ("What does {name} study?", "What is the main subject of {name}?"),
            "de": ("Was studiert {name}?", "Was ist das Hauptfach von {name}?"),
            "sw": ("{name} anasoma nini?", "Somo kuu la {name} ni nini?"),
            "tr": ("{name} ne okuyor?", "{name} adlı kişinin bölümü ne?"),
        },
        (
            ("physics", "Physik", "fizikia", "fizik"),
            ("medicine", "Medizin", "tiba", "tıp"),
            ("law", "Jura", "sheria", "hukuk"),
            ("history", "Geschichte", "historia", "tarih"),
            ("music", "Musik", "muziki", "müzik"),
            ("chemistry", "Chemie", "kemia", "kimya"),
            ("mathematics", "Mathematik", "hisabati", "matematik"),
            ("biology", "Biologie", "biolojia", "biyoloji"),
            ("geography", "Geographie", "jiografia", "coğrafya"),
            ("art", "Kunst", "sanaa", "sanat"),
            ("agriculture", "Landwirtschaft", "kilimo", "tarım"),
            ("engineering", "Ingenieurwesen", "uhandisi", "mühendislik"),
            ("economics", "Volkswirtschaft", "uchumi", "iktisat"),
            ("philosophy", "Philosophie", "falsafa", "felsefe"),
            ("theology", "Theologie", "dini", "ilahiyat"),
            ("literature", "Literatur", "fasihi", "edebiyat"),
        ),
    ),
    Relation(
        "food",
        {
            "en": ("{name} eats {value} every day.", "{name} likes to eat {value}."),
            "de": ("{name} isst jeden Tag {value}.", "Am liebsten isst {name} {value}."),
            "sw": ("{name} anakula {value} kila siku.", "{name} anapenda kula {value}."),
            "tr": ("{name} her gün {value} yer.", "{name} {value} yemeyi sever."),
        },
        {
            "en": ("What does {name} eat every day?", "What does {name} like to eat?"),
            "de": ("Was isst {name} jeden Tag?", "Was isst {name} am liebsten?"),
            "sw": ("{name} anakula nini kila siku?", "{name} anapenda kula nini?"),
            "tr": ("{name} her gün ne yer?", "{name} ne yemeyi sever?"),
        },
        (
            ("rice", "Reis", "wali", "pilav"),
            ("bread", "Brot", "mkate", "ekmek"),
            ("fish", "Fisch", "samaki", "balık"),
            ("meat", "Fleisch", "nyama", "et"),
            ("cheese", "Käse", "jibini", "peynir"),
            ("honey", "Honig", "asali", "bal"),
            ("soup", "Suppe", "supu", "çorba"),
            ("beans", "Bohnen", "maharagwe", "fasulye"),
            ("potatoes", "Kartoffeln", "viazi", "patates"),
            ("bananas", "Bananen", "ndizi", "muz"),
            ("eggs", "Eier", "mayai", "yumurta"),
            ("cabbage", "Kohl", "kabichi", "lahana"),
            ("carrots", "Karotten", "karoti", "havuç"),
            ("oranges", "Orangen", "machungwa", "portakal"),
            ("peas", "Erbsen", "njegere", "bezelye"),
            ("tomatoes", "Tomaten", "nyanya", "domates"),
        ),
    ),
    Relation(
        "animals",
        {
            "en": ("{name} keeps {value}.", "{name} has {value} in the house."),
            "de": ("{name} hält {value}.", "{name} hat {value} im Haus."),
            "sw": ("{name} anafuga {value}.", "{name} ana {value} nyumbani."),
            "tr": ("{name} {value} besliyor.", "{name} adlı kişinin evinde {value} var."),
        },
        {
            "en": ("Which animals does {name} keep?", "Which animals does {name} have in the house?"),
            "de": ("Welche Tiere hält {name}?", "Welche Tiere hat {name} im Haus?"),
            "sw": ("{name} anafuga wanyama gani?", "{name} ana wanyama gani nyumbani?"),
            "tr": ("{name} hangi hayvanı besliyor?", "{name} adlı kişinin evinde hangi hayvan var?"),
        },
        (
            ("dogs", "Hunde", "mbwa", "köpek"),
            ("cats", "Katzen", "paka", "kedi"),
            ("horses", "Pferde", "farasi", "at"),
            ("cows", "Kühe", "ng'ombe", "inek"),
            ("goats", "Ziegen", "mbuzi", "keçi"),
            ("sheep", "Schafe", "kondoo", "koyun"),
            ("chickens", "Hühner", "kuku", "tavuk"),
            ("ducks", "Enten", "bata", "ördek"),
            ("pigeons", "Tauben", "njiwa", "güvercin"),
            ("bees", "Bienen", "nyuki", "arı"),
            ("donkeys", "Esel", "punda", "eşek"),
            ("camels", "Kamele", "ngamia", "deve"),
            ("rabbits", "Kaninchen", "sungura", "tavşan"),
            ("parrots", "Papageien", "kasuku", "papağan"),
            ("pigs", "Schweine", "nguruwe", "domuz"),
            ("turtles", "Schildkröten", "kobe", "kaplumbağa"),
        ),
    ),
)

# Given names, the same string in every language.
NAMES: tuple[str, ...] = tuple(
    """
    Abdul Abel Ada Adam Adele Adrian Agnes Aisha Akira Alan Alba Albert Alberto Aldo Alena Alex Alfred
    Ali Alice Alina Alma Amal Amanda Amara Amelia Amina Amir Amos Ana Andrea Andrew Angela Anika Anita
    Anna Anton Antonio Anya Arda Ariel Arman Arne Arthur Asha Astrid Aurora Ayla Aylin Barbara Basil
    Beatrice Ben Benito Berat Bernard Bianca Birgit Bjorn Boris Bruno Carla Carlos Carmen Caroline
    Cecilia Cem Chandra Chiara Chidi Christa Clara Claude Clemens Colin Conrad Cora Cornelia Cyril Dalia
    Damian Dana Daniel Daria David Delia Denise Dennis Derya Diana Diego Dina Dmitri Dominik Donald Dora
    Doris Edgar Edith Edward Elena Elias Elif Elisa Elmar Elsa Emil Emine Emma Enrico Erik Erika Ernst
    Esra Esther Eva Fabian Farid Fatima Felix Fiona Flora Florian Frank Franz Frieda Gabriel Georg Gina
    Giorgio Gisela Gloria Gordon Greta Gustav Hakim Hamza Hanna Harald Hasan Hassan Hector Heidi Helen
    Helga Henrik Hilda Hugo Ibrahim Ida Igor Ilse Imani Ines Ingrid Irene Iris Irma Isaac Isabel Ismail
    Ivan Ivo Jakob Jamal James Jana Jasmin Joana Johan Jonas Jorge Josef Judith Julia Juma Jutta Kamil
    Karim Karin Karl Kaspar Kemal Kenji Kerem Kiran Klara Knut Kofi Kurt Lamar Lara Lars Laura Lea Leila
    Lena Leo Leon Liam Lidia Lilian Linda Lisa Livia Lorenz Lotte Louis Lucas Lucia Luigi Luisa Lydia
    Magda Malik Manuel Marco Margit Maria Mario Marta Martin Matteo Maya Mehmet Melek Mia Miguel Milan
    Mina Mira Miriam Monika Moritz Murat Musa Nadia Naomi Natalia Neema Nico Nina Noah Nora Norbert Nuri
    Olaf Olga Oliver Omar Orhan Oscar Otto Pablo Paula Pedro Petra Philip Pia Rafael Rahel Ramona Rashid
    Raul Rebecca Renata Rita Robert Rosa Ruben Rudolf Ruth Sabine Salim Samuel Sandra Sara Selim Serena
    Sibel Silvia Simon Sofia Sonja Stefan Stella Susanne Sven Tamara Tarik Teresa Theo Tobias Ulrich
    Umut Ursula Valentin Vera Victor Viola Walter Werner Yara Yusuf Zara Zeynep
    """.split()  # noqa: SIM905 - a list of 305 quoted strings hides the names
)
