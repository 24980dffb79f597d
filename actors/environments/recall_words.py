"""The words of the recall tasks: people, things, and how facts about them are told and asked. Train and eval lists are disjoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relation:
    """What can be told of a person. Values are short answers (1 to 3 words) by split; questions never repeat the telling."""

    name: str
    tellings: tuple[str, ...]
    questions: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]


def _split(train: str, held_out: str) -> dict[str, tuple[str, ...]]:
    return {"train": words(train), "eval": words(held_out)}


def words(text: str) -> tuple[str, ...]:
    """Of a list with commas."""
    return tuple(word.strip() for word in text.split(","))


def _dates(months: str) -> tuple[str, ...]:
    return tuple(f"{month} {day}" for month in words(months) for day in range(1, 29))


PEOPLE = _split(
    "Adam, Alice, Amy, Anna, Anton, Arthur, Ben, Bruno, Carl, Carol, Chloe, Clara, Daniel, David, Diana, Edgar, Ella, Emma, Eric, Eva, Felix, Fiona, "
    "Frank, Fred, George, Grace, Hannah, Harry, Helen, Henry, Hugo, Ian, Irene, Isaac, Ivan, Jack, Jane, Jason, Julia, Kate, Kevin, Laura, Leo, "
    "Linda, Louis, Lucy, Maria, Mark, Martin, Mary, Max, Michael, Nina, Oliver, Oscar, Paul, Peter, Rachel, Robert, Rosa, Ruth, Sam, Sarah, Simon, "
    "Sophie, Susan, Thomas, Tom, Victor, William",
    "Aaron, Albert, Brian, Bella, Charles, Cecilia, Dora, Dennis, Edward, Elena, Gabriel, Gloria, Howard, Iris, James, Judith, Karen, Kenneth, Lily, "
    "Luke, Margaret, Matthew, Nancy, Nathan, Olivia, Patrick, Philip, Rebecca, Rose, Stella, Stephen, Teresa, Vera, Walter, Wendy, Zoe",
)

RELATIONS = (
    Relation(
        "home",
        (
            "{name} has moved to {value}.",
            "{name} settled in {value} last year.",
            "{name} rents a flat in {value}.",
        ),
        ("Where does {name} live?", "What city is {name}'s home?"),
        _split(
            "Paris, London, Berlin, Madrid, Rome, Vienna, Boston, Chicago, Dallas, Denver, Tokyo, Sydney, Dublin, Oslo, Cairo, Lima, Athens, Geneva, "
            "Munich, Milan, Toronto, Seattle",
            "Prague, Lisbon, Warsaw, Houston, Delhi, Moscow, Miami, Atlanta, Montreal, Seoul",
        ),
    ),
    Relation(
        "job",
        ("{name} works as a {value}.", "{name} found a job as a {value}.", "{name} has become a {value}."),
        ("What is {name}'s job?", "What does {name} do for a living?"),
        _split(
            "teacher, doctor, nurse, lawyer, baker, farmer, driver, painter, writer, singer, plumber, carpenter, pilot, judge, chef, banker, tailor, "
            "gardener, librarian, dentist",
            "chemist, butcher, sailor, photographer, musician, barber, waiter, translator, journalist, biologist",
        ),
    ),
    Relation(
        "pet",
        ("{name} adopted a {value}.", "{name} keeps a {value} at home.", "{name} takes care of a {value}."),
        ("What pet does {name} have?", "Which animal lives with {name}?"),
        _split(
            "dog, cat, rabbit, parrot, hamster, turtle, goldfish, pony, lizard, snake, duck, goat, mouse, frog, spider",
            "canary, ferret, sheep, chicken, donkey, pig, crab, goose",
        ),
    ),
    Relation(
        "birthday",
        ("{name} was born on {value}.", "{name} turns a year older on {value}."),
        ("When is {name}'s birthday?", "On what date does {name} celebrate a birthday?"),
        {
            "train": _dates("January, February, March, May, June, August, September, December"),
            "eval": _dates("April, July, October, November"),
        },
    ),
    Relation(
        "instrument",
        (
            "{name} plays the {value} in a band.",
            "{name} is learning the {value}.",
            "{name} practices the {value} every day.",
        ),
        ("What instrument does {name} play?", "On which instrument does {name} make music?"),
        _split(
            "piano, guitar, violin, drums, flute, trumpet, harp, organ, saxophone, banjo, clarinet",
            "cello, accordion, trombone, bass, ukulele",
        ),
    ),
    Relation(
        "dish",
        (
            "{name} loves {value} more than any other food.",
            "{name} could eat {value} every day.",
            "{name} always orders {value}.",
        ),
        ("What is {name}'s favorite food?", "What does {name} like to eat?"),
        _split(
            "pizza, pasta, soup, rice, curry, salad, steak, sushi, pancakes, tacos, noodles, cheese, lamb, beans, eggs, salmon",
            "dumplings, chili, bread, waffles, shrimp, mushrooms, potatoes, tofu",
        ),
    ),
    Relation(
        "purchase",
        (
            "{name} bought a {value} yesterday.",
            "{name} paid for a new {value}.",
            "{name} came back from the shop with a {value}.",
        ),
        ("What did {name} buy?", "What is {name}'s new possession?"),
        _split(
            "lamp, bicycle, camera, sofa, watch, jacket, laptop, tent, mirror, carpet, helmet, kettle, printer, ladder, clock, radio, blanket",
            "desk, phone, hammer, scarf, backpack, telescope, bookshelf, fridge, umbrella",
        ),
    ),
    Relation(
        "holiday",
        (
            "{name} spent the holidays in {value}.",
            "{name} is back from a trip to {value}.",
            "{name} took a plane to {value} for a break.",
        ),
        ("Which country did {name} visit?", "Where did {name} go on vacation?"),
        _split(
            "Italy, France, Spain, Greece, Japan, Brazil, Egypt, Canada, Mexico, Norway, India, Peru, Chile, Kenya, Ireland, Turkey, Poland, Cuba",
            "Portugal, Sweden, Morocco, China, Austria, Finland, Iceland, Vietnam, Nepal",
        ),
    ),
    Relation(
        "hobby",
        (
            "{name} goes {value} every weekend.",
            "{name} has taken up {value}.",
            "{name} spends free time on {value}.",
        ),
        ("What is {name}'s hobby?", "How does {name} relax?"),
        _split(
            "fishing, hiking, sailing, skiing, climbing, running, cycling, swimming, dancing, camping, rowing",
            "surfing, skating, diving, bowling, hunting",
        ),
    ),
)

FILLERS = (
    "It rained all morning.",
    "The bus was late again.",
    "The coffee tasted good.",
    "Nobody saw the news.",
    "The street was very quiet.",
    "The shop opens at nine.",
    "The old bridge was closed.",
    "A new film came out.",
    "The garden looks lovely.",
    "The elevator is broken.",
    "It was a long week.",
    "The weather turned cold.",
    "The market was crowded.",
    "The train left on time.",
    "Someone left a window open.",
    "The library was full.",
    "The sky was clear.",
    "Lunch was served outside.",
    "The lights went out.",
    "The road was icy.",
)
