"""Holds the words that the generated tasks are made of.

Every noun belongs to exactly one category, so that "keep only the animals" has one answer. All tables are ordered
tuples: the order is part of the seed of everything drawn from them.
"""

from random import Random

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": tuple(
        "cat dog horse cow sheep goat pig rabbit mouse lion tiger bear wolf fox deer camel monkey elephant".split()
    ),
    "bird": tuple("robin eagle owl crow swan duck goose hen parrot pigeon sparrow falcon".split()),
    "insect": tuple("ant bee wasp beetle moth cricket fly butterfly spider hornet".split()),
    "fruit": tuple("apple pear banana grape lemon mango peach plum cherry melon apricot fig".split()),
    "vegetable": tuple("carrot onion potato cabbage spinach lettuce leek turnip celery pea bean garlic".split()),
    "drink": tuple("water milk tea coffee juice cocoa cider lemonade soda broth".split()),
    "dish": tuple("soup bread pizza pasta salad stew pie cake curry omelette pancake sandwich".split()),
    "colour": tuple("red blue green yellow purple pink brown black white grey silver crimson".split()),
    "garment": tuple("shirt coat hat scarf glove sock boot dress skirt jacket belt sweater".split()),
    "tool": tuple("hammer saw drill shovel rake axe wrench ladder brush knife needle pliers".split()),
    "vehicle": tuple("car bus train bicycle truck boat ship tram van rocket ferry scooter".split()),
    "furniture": tuple("table chair sofa bed desk shelf lamp stool cupboard bench mirror carpet".split()),
    "job": tuple("doctor teacher farmer baker nurse lawyer pilot sailor painter singer tailor judge".split()),
    "instrument": tuple("piano violin guitar drum flute trumpet harp cello banjo organ".split()),
    "sport": tuple("tennis football hockey rugby golf boxing cycling rowing karate chess".split()),
    "place": tuple("school hospital market library museum station garden kitchen castle church harbour park".split()),
    "tree": tuple("oak pine birch maple willow cedar elm spruce".split()),
    "flower": tuple("rose tulip daisy lily violet poppy orchid daffodil".split()),
    "metal": tuple("iron gold copper tin zinc lead nickel steel".split()),
    "body part": tuple("hand foot head arm leg nose ear knee elbow shoulder finger neck".split()),
}

PLURAL_CATEGORIES: dict[str, str] = {
    "animal": "animals",
    "bird": "birds",
    "insect": "insects",
    "fruit": "fruits",
    "vegetable": "vegetables",
    "drink": "drinks",
    "dish": "dishes",
    "colour": "colours",
    "garment": "garments",
    "tool": "tools",
    "vehicle": "vehicles",
    "furniture": "pieces of furniture",
    "job": "jobs",
    "instrument": "instruments",
    "sport": "sports",
    "place": "places",
    "tree": "trees",
    "flower": "flowers",
    "metal": "metals",
    "body part": "body parts",
}

CATEGORY_OF: dict[str, str] = {noun: category for category, nouns in CATEGORIES.items() for noun in nouns}
NOUNS: tuple[str, ...] = tuple(CATEGORY_OF)

# Things a person can carry, own or buy: what the little stories are about.
OBJECTS: tuple[str, ...] = tuple(
    noun for name in ("fruit", "garment", "tool", "furniture", "instrument", "animal") for noun in CATEGORIES[name]
)

WOMEN: tuple[str, ...] = tuple(
    "Anna Mary Julia Sara Laura Emma Nina Clara Rosa Helen Lucy Eva Ruth Diana Grace Olga".split()
)
MEN: tuple[str, ...] = tuple(
    "Tom Peter David Paul Mark Simon Karl Omar Hugo Ivan Leo Martin Felix Adam Oscar Victor".split()
)
NAMES: tuple[str, ...] = WOMEN + MEN

# city -> country
CITIES: dict[str, str] = {
    "Paris": "France",
    "Rome": "Italy",
    "Madrid": "Spain",
    "Berlin": "Germany",
    "Vienna": "Austria",
    "Lisbon": "Portugal",
    "Athens": "Greece",
    "Cairo": "Egypt",
    "Tokyo": "Japan",
    "Delhi": "India",
    "Lima": "Peru",
    "Oslo": "Norway",
    "Dublin": "Ireland",
    "Warsaw": "Poland",
    "Prague": "Czechia",
    "Havana": "Cuba",
    "Nairobi": "Kenya",
    "Moscow": "Russia",
    "Seoul": "Korea",
    "Ottawa": "Canada",
}

# adjective -> opposite, in both directions
_OPPOSITES = (
    "big small|hot cold|old new|fast slow|happy sad|clean dirty|rich poor|strong weak|loud quiet|full empty"
    "|dark bright|dry wet|soft hard|heavy light|wide narrow|early late|safe dangerous|brave timid|cheap expensive"
    "|sweet bitter|thick thin|tall short|smooth rough|simple complex"
)
OPPOSITES: dict[str, str] = {}
for _pair in _OPPOSITES.split("|"):
    _one, _other = _pair.split()
    OPPOSITES[_one] = _other
    OPPOSITES[_other] = _one
ADJECTIVES: tuple[str, ...] = tuple(OPPOSITES)

# Transitive verbs: base, third person, past, participle, -ing.
VERBS: tuple[tuple[str, str, str, str, str], ...] = tuple(
    (fields[0], fields[1], fields[2], fields[3], fields[4])
    for fields in (
        line.split()
        for line in (
            "see sees saw seen seeing|take takes took taken taking|buy buys bought bought buying"
            "|sell sells sold sold selling|find finds found found finding|lose loses lost lost losing"
            "|bring brings brought brought bringing|carry carries carried carried carrying"
            "|paint paints painted painted painting|clean cleans cleaned cleaned cleaning"
            "|hide hides hid hidden hiding|draw draws drew drawn drawing|keep keeps kept kept keeping"
            "|choose chooses chose chosen choosing|break breaks broke broken breaking"
            "|want wants wanted wanted wanting|like likes liked liked liking|need needs needed needed needing"
            "|push pushes pushed pushed pushing|wash washes washed washed washing"
            "|hold holds held held holding|steal steals stole stolen stealing|fix fixes fixed fixed fixing"
            "|drop drops dropped dropped dropping|send sends sent sent sending|catch catches caught caught catching"
            "|watch watches watched watched watching|move moves moved moved moving"
            "|borrow borrows borrowed borrowed borrowing|admire admires admired admired admiring"
        ).split("|")
    )
)

PLURALS: dict[str, str] = {
    **{
        noun: noun + "s"
        for name in (
            "animal",
            "bird",
            "fruit",
            "vegetable",
            "garment",
            "tool",
            "vehicle",
            "furniture",
            "job",
            "instrument",
            "tree",
            "flower",
            "insect",
            "body part",
        )
        for noun in CATEGORIES[name]
    },
    "sheep": "sheep",
    "mouse": "mice",
    "wolf": "wolves",
    "fox": "foxes",
    "deer": "deer",
    "goose": "geese",
    "fly": "flies",
    "butterfly": "butterflies",
    "peach": "peaches",
    "cherry": "cherries",
    "mango": "mangoes",
    "potato": "potatoes",
    "spinach": "spinach",
    "celery": "celery",
    "garlic": "garlic",
    "brush": "brushes",
    "knife": "knives",
    "pliers": "pliers",
    "bus": "buses",
    "ferry": "ferries",
    "shelf": "shelves",
    "bench": "benches",
    "scarf": "scarves",
    "dress": "dresses",
    "daisy": "daisies",
    "lily": "lilies",
    "poppy": "poppies",
    "foot": "feet",
    "birch": "birches",
    "spruce": "spruces",
}


def _table(pairs: str) -> dict[str, str]:
    return {key: value for key, _, value in (pair.partition(":") for pair in pairs.split())}


# Small tables of general knowledge; each is one memorised mapping.
FACTS: dict[str, dict[str, str]] = {
    "sound": _table(
        "cat:meow dog:woof cow:moo sheep:baa pig:oink lion:roar duck:quack owl:hoot crow:caw bee:buzz mouse:squeak "
        "wolf:howl horse:neigh hen:cluck robin:tweet"
    ),
    "young": _table(
        "cat:kitten dog:puppy cow:calf sheep:lamb horse:foal goat:kid pig:piglet lion:cub deer:fawn goose:gosling "
        "duck:duckling hen:chick swan:cygnet owl:owlet"
    ),
    "home": _table(
        "bee:hive ant:hill robin:nest cow:barn horse:stable dog:kennel rabbit:burrow fox:den spider:web pig:sty "
        "fish:pond camel:desert monkey:jungle lion:savanna"
    ),
    "tint": _table(
        "banana:yellow cherry:red lemon:yellow plum:purple carrot:red spinach:green cocoa:brown "
        "milk:white rose:red "
        "daffodil:yellow crow:black swan:white elephant:grey pig:pink pea:green coffee:brown lettuce:green "
        "poppy:red mouse:grey potato:brown"
    ),
    "workplace": _table(
        "doctor:hospital teacher:school farmer:field baker:bakery nurse:clinic lawyer:office pilot:airport "
        "sailor:ship "
        "painter:studio singer:stage tailor:shop judge:court"
    ),
    "maker": _table(
        "bread:baker picture:painter suit:tailor song:singer wheat:farmer lesson:teacher verdict:judge "
        "contract:lawyer flight:pilot cure:doctor"
    ),
    "use": _table(
        "hammer:hit saw:cut shovel:dig ladder:climb brush:sweep needle:sew knife:slice axe:chop wrench:turn "
        "drill:bore "
        "rake:gather pliers:grip"
    ),
    "worn_on": _table("hat:head scarf:neck glove:hand boot:foot sock:foot belt:waist jacket:body"),
    "country": dict(CITIES),
    "opposite": dict(OPPOSITES),
    "plural": dict(PLURALS),
    "past": {verb[0]: verb[2] for verb in VERBS},
    "participle": {verb[0]: verb[3] for verb in VERBS},
    "gerund": {verb[0]: verb[4] for verb in VERBS},
    "base form": {verb[2]: verb[0] for verb in VERBS},
    "third person": {verb[0]: verb[1] for verb in VERBS},
    "category": dict(CATEGORY_OF),
}

NUMBER_WORDS: tuple[str, ...] = tuple(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty".split()
)
ORDINALS: tuple[str, ...] = tuple("first second third fourth fifth sixth".split())
DAYS: tuple[str, ...] = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
MONTHS: tuple[str, ...] = tuple(
    "January February March April May June July August September October November December".split()
)

PRAISE: tuple[str, ...] = tuple(
    "great lovely excellent wonderful perfect superb delightful amazing fine charming".split()
)
BLAME: tuple[str, ...] = tuple("awful terrible poor horrible useless broken boring ugly nasty dreadful".split())

TOPICS: dict[str, tuple[str, ...]] = {
    "sports": tuple("match goal team player coach race medal stadium score trophy".split()),
    "cooking": tuple("oven recipe flour sugar butter pan spoon salt dinner sauce".split()),
    "travel": tuple("hotel ticket passport beach suitcase airport tour map island guide".split()),
    "music": tuple("song concert melody band chorus rhythm singer record tune stage".split()),
    "weather": tuple("rain snow wind storm cloud thunder fog sunshine frost hail".split()),
    "science": tuple("atom planet theory laboratory telescope cell energy experiment magnet gas".split()),
    "money": tuple("bank loan tax price wage coin budget profit debt market".split()),
    "health": tuple("fever medicine pulse bandage pill cough vitamin diet clinic wound".split()),
}

LANGUAGES: tuple[str, ...] = ("Zorian", "Velic", "Mundo", "Kesh", "Tallow", "Brin", "Osk", "Rulan")
# What an invented language has words for.
TRANSLATABLE: tuple[str, ...] = ("animal", "fruit", "colour", "garment", "vehicle", "furniture", "drink", "tool")

_ONSETS = (
    "b d g k l m n p r s t v z".split(),
    "br dr f h j l m n sh st t w".split(),
    "ch k l m n p pl qu r s tr v".split(),
    "b f gl h k l n r s sk t y".split(),
)
_VOWELS = ("a e i o u".split(), "a ai e o oo".split(), "e i ia u ou".split(), "a ea i o u".split())


def invented_words(language: str) -> dict[str, str]:
    """Return the dictionary of an invented language: English noun or adjective -> a made-up word, one to one."""
    rng = Random(f"invented language {language}")
    style = LANGUAGES.index(language) % len(_ONSETS)
    ending = rng.choice("n l r s k m".split())
    taken: set[str] = set(NOUNS)
    words: dict[str, str] = {}
    english = [noun for category in TRANSLATABLE for noun in CATEGORIES[category]] + list(ADJECTIVES)
    for word in english:
        while True:
            made_up = "".join(rng.choice(_ONSETS[style]) + rng.choice(_VOWELS[style]) for _ in range(2))
            if rng.random() < 0.5:
                made_up += ending
            if made_up not in taken:
                break
        taken.add(made_up)
        words[word] = made_up
    return words
