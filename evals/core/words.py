"""Words for needle keys. Held out: no word here may appear in the keys that the bundled teachers were trained on
(`zoo.conversion.core.words`; a test holds the two lists apart), nor in the keys of books-llama-22m, which it shows when
it is sampled.
"""

from __future__ import annotations

_ADJECTIVES = """
abrupt agile ample arid bashful blunt brisk brittle candid chilly clumsy coarse cosmic crisp cunning damp
dapper earnest fabled feisty frosty gaudy glossy grumpy hasty humid jagged lanky
lavish limber lofty mellow murky nimble opaque ornate pallid plucky prickly quaint rugged rusty shabby sleek sly snug
somber sturdy supple tangy tepid thrifty timid uneven velvety wiry witty zealous
"""
_NOUNS = """
acorn almond anvil badger balcony bamboo banjo beacon beetle bonnet bucket cabbage cactus canoe caravan chimney
cobbler comet cricket dagger dolphin donkey easel falcon ferret fiddle flask fountain gazelle glacier goblet hammock
hatchet hedgehog iguana jackal javelin lagoon lizard lobster magnet mitten mustard nutmeg orchid
oyster paddle parsnip pelican pigeon pulley quiver raccoon radish sparrow spindle teapot thimble trumpet turnip
vineyard walnut weasel whistle yacht zipper
"""
ADJECTIVES: tuple[str, ...] = tuple(_ADJECTIVES.split())
NOUNS: tuple[str, ...] = tuple(_NOUNS.split())
EVAL_WORDS: tuple[str, ...] = ADJECTIVES + NOUNS


def keys() -> list[str]:
    """Every "adjective-noun" key, sorted, so that a seeded sample is the same everywhere."""
    return sorted(f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS)
