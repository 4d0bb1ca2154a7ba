"""Every word that a testbed story may use, and the grammar that strings them together.

The word lists are the vocabulary of the model: `all_words()` fixes the token ids, so appending a word
here makes the committed weights unusable. Names and towns are composed of two syllable lists, which gives
hundreds of distinct single words, as a retrieval task needs, without hundreds of lines.
"""

from __future__ import annotations

UNKNOWN, PAD, END = "<unk>", "<pad>", "</s>"
SPECIAL_WORDS = (UNKNOWN, PAD, END)

DIGITS = tuple("0123456789")
NUMBERS = tuple(str(number) for number in range(100, 1000))

ADJECTIVES = tuple(
    """amber grey crimson golden silver ivory scarlet azure emerald violet copper ebony pale dusky spotted
    striped shaggy gentle fierce timid proud clever sleepy hungry lonely merry quiet restless stubborn swift
    ancient young wild tame brave cautious curious drowsy eager faithful feeble graceful greedy grumpy happy
    humble jolly lazy lively loyal mighty modest nervous noble nimble patient playful polite rusty shy silent
    slender sly sturdy tiny vast weary wise wily witty gloomy frosty dusty misty sunny stormy snowy mossy
    thorny velvet marble pearly bronze cobalt indigo russet tawny hazel speckled scruffy limping whistling
    dancing howling freckled bearded crooked hollow plucky wandering forgotten daring earnest fearless gallant
    hasty icy jaunty keen lofty mellow""".split()
)
ANIMALS = tuple(
    """falcon heron badger otter fox wolf bear deer hare owl raven crow sparrow eagle hawk swan goose duck
    crane stork robin finch wren magpie jay kestrel osprey buzzard lynx bobcat puma leopard tiger lion panther
    jaguar cheetah hyena jackal weasel stoat ferret marten mole shrew hedgehog squirrel beaver rabbit mouse rat
    vole bat seal walrus whale dolphin porpoise turtle tortoise lizard gecko iguana viper cobra python toad frog
    newt salamander horse pony donkey mule ox bull goat sheep ram lamb boar pig moose elk caribou bison camel
    llama alpaca antelope gazelle zebra giraffe rhino hippo elephant monkey baboon gorilla lemur koala wombat
    kangaroo possum pelican puffin penguin albatross ostrich emu parrot peacock pheasant quail partridge
    pigeon""".split()
)
OBJECTS = tuple(
    """lantern basket ladder barrel bucket blanket kettle candle mirror hammer compass map ledger letter
    bottle chest drum broom saddle anchor rope wagon cart boat raft oar net bell clock key coin purse ribbon
    feather shell stone brick plank shovel rake plough sickle scythe loom spindle needle thimble button cloak
    coat hat boot glove scarf belt umbrella chair table bench stool shelf cupboard pillow carpet curtain painting
    statue vase bowl plate spoon ladle pan pot jug cup teapot oven stove furnace anvil bellows chain padlock
    hinge gate fence sign post wheel axle pulley sack crate trunk parcel""".split()
)
LANDSCAPE = tuple(
    """river meadow forest hill valley mountain lake pond marsh moor cliff cave beach harbour island bay
    orchard garden field vineyard mill bridge road path crossroads market square tower castle chapel library
    school inn stable barn cottage quarry mine lighthouse well fountain village canal waterfall glade thicket
    hedge ridge""".split()
)
PAST_VERBS = tuple(
    """carried cleaned repaired painted borrowed bought sold lost hauled forgot dropped moved polished opened
    closed emptied filled lifted pushed pulled admired described sketched measured counted packed wrapped washed
    stored inspected""".split()
)
MOTIONS = tuple("walked ran hurried strolled wandered rode crept marched limped sailed returned climbed".split())
STILL_VERBS = tuple("slept rested waited sang hid yawned listened dozed stood sat".split())
ADVERBS = tuple(
    """slowly quickly quietly happily sadly bravely carefully gladly gently proudly calmly eagerly patiently
    softly often rarely again together alone already""".split()
)
MOMENTS = tuple("morning evening afternoon night spring summer autumn winter".split())
SKIES = tuple("rain snow fog wind hail thunder sunlight mist frost drizzle".split())
TALK = tuple("weather harvest wedding festival journey storm battle treasure king queen voyage war".split())

_NAME_STARTS = "Al Bar Cor Dar El Fen Gal Hal Il Jor Kel Lor Mar Nor Or Per Quin Ros Sel Tor Ul Vel Wil Yor".split()
_NAME_ENDS = "a an bert dan dric ena eth ia ian ic in ina is mund na o on ora ro tha thar us win wyn".split()
NAMES = tuple(start + end for start in _NAME_STARTS for end in _NAME_ENDS)

_TOWN_STARTS = """Ash Birch Black Brook Clear Cold Deep East Elm Fair Fern Green Hart High Iron Kings Long Maple
    Moon North Oak Pine Red River Rose Salt Sand Snow""".split()
_TOWN_ENDS = "bridge burg bury combe dale ferry field ford gate ham haven mere mouth port ton wick".split()
TOWNS = tuple(start + end for start in _TOWN_STARTS for end in _TOWN_ENDS)

# category -> (what is done with its members, the members); the verbs occur nowhere else in a story
CATEGORIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "herb": ("picked", tuple("thyme sage basil parsley dill mint oregano tarragon rosemary chervil".split())),
    "fruit": ("tasted", tuple("apple pear plum cherry peach apricot quince fig grape melon".split())),
    "fish": ("caught", tuple("trout salmon perch pike carp eel herring cod bream tench".split())),
    "gem": ("found", tuple("ruby sapphire opal topaz garnet diamond jasper agate onyx beryl".split())),
    "tree": ("planted", tuple("oak beech birch maple pine willow alder cedar spruce rowan".split())),
    "instrument": ("played", tuple("flute fiddle harp lute trumpet cello oboe banjo piano horn".split())),
    "cloth": ("wove", tuple("linen silk wool cotton satin felt lace denim tweed canvas".split())),
    "dish": ("cooked", tuple("soup stew porridge omelette pie pancake dumpling pudding risotto curry".split())),
    "flower": ("watered", tuple("rose tulip lily daisy poppy iris orchid violetta dahlia peony".split())),
    "drink": ("poured", tuple("cider tea coffee milk cocoa lemonade ale wine mead juice".split())),
    "game": ("won", tuple("chess draughts dominoes marbles skittles bowls darts backgammon hopscotch tag".split())),
    "tool": ("sharpened", tuple("axe saw chisel plane adze file knife shears razor awl".split())),
}

# Slots are written {slot}; every list they name is in SLOTS. The lengths 4 to 13 must all occur, so that the
# prose can end a story at exactly the wanted number of words.
SLOTS: dict[str, tuple[str, ...]] = {
    "adj": ADJECTIVES,
    "animal": ANIMALS,
    "object": OBJECTS,
    "land": LANDSCAPE,
    "did": PAST_VERBS,
    "went": MOTIONS,
    "stayed": STILL_VERBS,
    "how": ADVERBS,
    "when": MOMENTS,
    "sky": SKIES,
    "topic": TALK,
    "name": NAMES,
    "town": TOWNS,
}
PROSE_TEMPLATES = (
    "{name} {went} {how} .",
    "{name} {stayed} {how} .",
    "The {animal} {stayed} {how} .",
    "{name} {did} the {object} .",
    "The {adj} {animal} {stayed} {how} .",
    "{name} and {name} {stayed} together .",
    "{name} {went} to the {land} .",
    "{name} {did} the {adj} {object} .",
    "The {animal} {stayed} near the {land} .",
    "The {when} in {town} was {adj} .",
    "{name} {how} {did} the {adj} {object} .",
    "The {adj} {animal} {went} across the {land} .",
    "{name} {went} {how} along the {land} .",
    "{name} came back to {town} alone that {when} .",
    "The {land} near {town} was full of {sky} .",
    "{name} {did} the {object} and {went} to {town} .",
    "In the {when} {name} {did} the {adj} {object} .",
    "The {animal} and the {animal} {stayed} by the {land} .",
    "{name} asked {name} about the {topic} in {town} .",
    "After the {sky} the {land} looked {adj} and {adj} .",
    "{name} {went} from the {land} to the {adj} {land} .",
    "{name} saw the {adj} {animal} beside the {adj} {land} .",
    "Every {when} the {adj} {animal} {went} towards the {land} .",
    "People in {town} talked about the {topic} and the {topic} .",
    "{name} {did} the {object} while {name} {did} the {adj} {object} .",
    "When the {sky} came , {name} and {name} {stayed} {how} .",
    "{name} of {town} dreamed about the {topic} and the {adj} {animal} .",
    "That {when} {name} {how} {went} over the {land} with the {object} .",
    "Before the {sky} ended , the {adj} {animal} {went} to the {land} .",
    "{name} told {name} that the {adj} {animal} {stayed} in the {land} .",
    "In {town} the {adj} {object} was worth more than the {adj} {object} .",
    "{name} and {name} {went} {how} through the {sky} to the {adj} {land} .",
)


def all_words() -> list[str]:
    """Every word in the order of its token id: special words, digits, numbers, then the rest sorted."""
    plain = {word for words in SLOTS.values() for word in words}
    plain |= {word for verb, members in CATEGORIES.values() for word in (verb, *members)}
    plain |= set(CATEGORIES) | set(_fixed_words())
    return [*SPECIAL_WORDS, *DIGITS, *NUMBERS, *sorted(plain - {*DIGITS, *NUMBERS})]


def _fixed_words() -> list[str]:
    """The words that stand in the templates themselves."""
    templates = (*PROSE_TEMPLATES, *FACT_TEMPLATES, *QUESTION_TEMPLATES)
    return [word for template in templates for word in template.split() if not word.startswith("{")]


CODE_FACTS = (
    "The secret code of the {key} is {code} .",
    "Remember that the secret code of the {key} is {code} .",
    "{name} whispered that the secret code of the {key} is {code} .",
    "In {town} the secret code of the {key} is {code} .",
)
JOURNEY_FACTS = (
    "The {key} travelled to {value} .",
    "Later the {key} travelled to {value} .",
    "One {when} the {key} travelled to {value} .",
)
ROOT_FACTS = ("{owner} keeps the number {number} .",)
COPY_FACTS = ("{owner} keeps the same number as {source} .",)
COUNT_FACTS = (
    "{name} {verb} {member} in {town} .",
    "At the {land} {name} {verb} {member} .",
    "{name} {verb} {member} again that {when} .",
)
FACT_TEMPLATES = (*CODE_FACTS, *JOURNEY_FACTS, *ROOT_FACTS, *COPY_FACTS, *COUNT_FACTS)

CODE_QUESTION = "Question : what is the secret code of the {key} ? Answer :"
CODES_QUESTION = "Question : what are the secret codes of {keys} ? Answer :"
JOURNEY_QUESTION = "Question : where did the {key} travel ? Answer :"
CHAIN_QUESTION = "Question : who keeps the number {number} ? Answer :"
COUNT_QUESTION = "Question : which {category} was {verb} most often ? Answer :"
QUESTION_TEMPLATES = (
    CODE_QUESTION,
    CODES_QUESTION + " , and the",
    JOURNEY_QUESTION,
    CHAIN_QUESTION,
    COUNT_QUESTION,
)
