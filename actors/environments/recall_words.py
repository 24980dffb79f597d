"""The words of the recall tasks: people, answers, and how a fact is told and asked.

The lists of train and eval are disjoint. The wide lists at the end are for training only: with the small
lists alone, a long training may learn the answers by heart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Relation:
    """What can be told of a person. ``values`` are the answers (1 to 3 words) of each split.

    A question never repeats the words of a telling. ``unwritten_question`` is a third wording. It is only
    asked of held-out people (``recall.asked=other``): no demonstrated flashcard has it.
    """

    name: str
    tellings: tuple[str, ...]
    questions: tuple[str, str]
    unwritten_question: str
    values: Mapping[str, tuple[str, ...]] = field(hash=False)  # a mapping has no hash


def _split(train: str, held_out: str) -> dict[str, tuple[str, ...]]:
    return {"train": words(train), "eval": words(held_out)}


def words(text: str) -> tuple[str, ...]:
    """The words of a list with commas."""
    return tuple(word.strip() for word in text.split(","))


def _dates(months: str) -> tuple[str, ...]:
    return tuple(f"{month} {day}" for month in words(months) for day in range(1, 29))


PEOPLE = _split(
    "Adam, Alice, Amy, Anna, Anton, Arthur, Ben, Bruno, Carl, Carol, Chloe, Clara, Daniel, David, Diana, "
    "Edgar, Ella, Emma, Eric, Eva, Felix, Fiona, Frank, Fred, George, Grace, Hannah, Harry, Helen, Henry, "
    "Hugo, Ian, Irene, Isaac, Ivan, Jack, Jane, Jason, Julia, Kate, Kevin, Laura, Leo, Linda, Louis, Lucy, "
    "Maria, Mark, Martin, Mary, Max, Michael, Nina, Oliver, Oscar, Paul, Peter, Rachel, Robert, Rosa, Ruth, "
    "Sam, Sarah, Simon, Sophie, Susan, Thomas, Tom, Victor, William",
    "Aaron, Albert, Brian, Bella, Charles, Cecilia, Dora, Dennis, Edward, Elena, Gabriel, Gloria, Howard, "
    "Iris, James, Judith, Karen, Kenneth, Lily, Luke, Margaret, Matthew, Nancy, Nathan, Olivia, Patrick, "
    "Philip, Rebecca, Rose, Stella, Stephen, Teresa, Vera, Walter, Wendy, Zoe",
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
        "Which town does {name} reside in?",
        _split(
            "Paris, London, Berlin, Madrid, Rome, Vienna, Boston, Chicago, Dallas, Denver, Tokyo, Sydney, "
            "Dublin, Oslo, Cairo, Lima, Athens, Geneva, Munich, Milan, Toronto, Seattle",
            "Prague, Lisbon, Warsaw, Houston, Delhi, Moscow, Miami, Atlanta, Montreal, Seoul",
        ),
    ),
    Relation(
        "job",
        ("{name} works as a {value}.", "{name} found a job as a {value}.", "{name} has become a {value}."),
        ("What is {name}'s job?", "What does {name} do for a living?"),
        "How does {name} earn money?",
        _split(
            "teacher, doctor, nurse, lawyer, baker, farmer, driver, painter, writer, singer, plumber, "
            "carpenter, pilot, judge, chef, banker, tailor, gardener, librarian, dentist",
            "chemist, butcher, sailor, photographer, musician, barber, waiter, translator, journalist, "
            "biologist",
        ),
    ),
    Relation(
        "pet",
        ("{name} adopted a {value}.", "{name} keeps a {value} at home.", "{name} takes care of a {value}."),
        ("What pet does {name} have?", "Which animal lives with {name}?"),
        "What creature does {name} own?",
        _split(
            "dog, cat, rabbit, parrot, hamster, turtle, goldfish, pony, lizard, snake, duck, goat, mouse, "
            "frog, spider",
            "canary, ferret, sheep, chicken, donkey, pig, crab, goose",
        ),
    ),
    Relation(
        "birthday",
        ("{name} was born on {value}.", "{name} turns a year older on {value}."),
        ("When is {name}'s birthday?", "On what date does {name} celebrate a birthday?"),
        "What is {name}'s date of birth?",
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
        "What is {name}'s musical instrument?",
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
        "Which meal does {name} prefer?",
        _split(
            "pizza, pasta, soup, rice, curry, salad, steak, sushi, pancakes, tacos, noodles, cheese, lamb, "
            "beans, eggs, salmon",
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
        "What has {name} purchased?",
        _split(
            "lamp, bicycle, camera, sofa, watch, jacket, laptop, tent, mirror, carpet, helmet, kettle, "
            "printer, ladder, clock, radio, blanket",
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
        "What was {name}'s travel destination?",
        _split(
            "Italy, France, Spain, Greece, Japan, Brazil, Egypt, Canada, Mexico, Norway, India, Peru, "
            "Chile, Kenya, Ireland, Turkey, Poland, Cuba",
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
        "Which pastime does {name} enjoy?",
        _split(
            "fishing, hiking, sailing, skiing, climbing, running, cycling, swimming, dancing, camping, "
            "rowing",
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

MORE_PEOPLE = words(
    "Abby, Adele, Agnes, Aidan, Alan, Alba, Alec, Alex, Alma, Amber, Andrew, Angela, Annika, Arlo, Astrid, "
    "Audrey, Barbara, Beatrice, Bernard, Bianca, Blake, Bob, Bonnie, Boris, Brenda, Bridget, Byron, Caleb, "
    "Calvin, Camille, Carla, Caroline, Casper, Cassandra, Celeste, Christine, Claire, Claude, Cliff, Clive, "
    "Colin, Connor, Cora, Craig, Cynthia, Daisy, Damian, Dana, Daphne, Darren, Dean, Debra, Delia, Derek, "
    "Dominic, Donald, Doris, Dorothy, Douglas, Duncan, Dylan, Earl, Edith, Eileen, Eli, Elias, Eliza, "
    "Elliot, Elsa, Emil, Enid, Erin, Ernest, Esther, Ethan, Eugene, Evan, Faye, Flora, Floyd, Frances, "
    "Gavin, Gemma, Geoffrey, Gerald, Gilbert, Gina, Glenn, Gordon, Graham, Greta, Gus, Gwen, Hans, Harold, "
    "Harriet, Hazel, Hector, Heidi, Herbert, Hilda, Holly, Ida, Igor, Ingrid, Irma, Isabel, Ivy, Jacob, "
    "Jake, Janet, Jasper, Jean, Jenny, Jerome, Jill, Joan, Joel, Jonas, Joseph, Josie, Joyce, Juan, Karl, "
    "Katrina, Keith, Kelly, Kim, Kurt, Lana, Lars, Leah, Lena, Leon, Leslie, Lewis, Liam, Lisa, Lloyd, "
    "Lola, Lorna, Lydia, Lyle, Mabel, Marcus, Marie, Marina, Marvin, Maya, Megan, Mia, Miles, Milo, Miriam, "
    "Molly, Mona, Monica, Morgan, Myra, Naomi, Neil, Nell, Nick, Nigel, Noah, Nora, Norman, Omar, Otto, "
    "Pamela, Pascal, Paula, Pearl, Penny, Petra, Phoebe, Polly, Quentin, Ralph, Ramona, Raymond, Regina, "
    "Rex, Rhoda, Rita, Roger, Roland, Roman, Ronald, Rory, Roy, Rufus, Russell, Sabine, Sally, Samuel, "
    "Sandra, Scott, Sean, Sheila, Sidney, Silas, Silvia, Sonia, Stanley, Steve, Stuart, Sybil, Tania, Ted, "
    "Terry, Thelma, Theo, Tina, Toby, Tracy, Trevor, Ursula, Valerie, Vernon, Vincent, Viola, Wallace, "
    "Wanda, Warren, Wilma, Winston, Yara, Yvonne"
)

MORE_VALUES: Mapping[str, tuple[str, ...]] = {
    "home": words(
        "Amsterdam, Ankara, Antwerp, Austin, Baghdad, Baltimore, Bangkok, Barcelona, Basel, Beirut, "
        "Belfast, Belgrade, Bergen, Bogota, Bologna, Bombay, Brisbane, Bristol, Brussels, Bucharest, "
        "Budapest, Buffalo, Calgary, Cambridge, Caracas, Cardiff, Casablanca, Charlotte, Cincinnati, "
        "Cleveland, Cologne, Copenhagen, Dakar, Damascus, Detroit, Dresden, Dubai, Durban, Edinburgh, "
        "Florence, Frankfurt, Genoa, Glasgow, Hamburg, Hanoi, Havana, Helsinki, Honolulu, Istanbul, "
        "Jakarta, Jerusalem, Kabul, Karachi, Krakow, Kyoto, Lagos, Leeds, Leipzig, Liverpool, Lyon, "
        "Manchester, Manila, Marseille, Melbourne, Memphis, Minneapolis, Minsk, Mumbai, Nairobi, Naples, "
        "Nashville, Osaka, Ottawa, Oxford, Palermo, Perth, Philadelphia, Phoenix, Pittsburgh, Portland, "
        "Porto, Quebec, Quito, Reykjavik, Riga, Rotterdam, Salzburg, Santiago, Sarajevo, Seville, Shanghai, "
        "Singapore, Sofia, Stockholm, Stuttgart, Taipei, Tallinn, Tampa, Tbilisi, Tehran, Tripoli, Tunis, "
        "Turin, Utrecht, Valencia, Vancouver, Venice, Verona, Vilnius, Washington, Wellington, York, "
        "Zagreb, Zurich"
    ),
    "job": words(
        "beekeeper, blacksmith, bookkeeper, botanist, brewer, bricklayer, broker, builder, captain, "
        "cashier, cleaner, coach, cobbler, comedian, composer, conductor, cook, courier, curator, dancer, "
        "decorator, designer, detective, diplomat, drummer, firefighter, fisherman, florist, geologist, "
        "glazier, goldsmith, guard, guide, hairdresser, historian, jeweler, jockey, juggler, lecturer, "
        "lifeguard, lumberjack, magician, manager, mason, mathematician, mechanic, merchant, midwife, "
        "miller, miner, minister, model, novelist, paramedic, pharmacist, philosopher, physicist, pianist, "
        "poet, policeman, politician, porter, potter, priest, printer, producer, professor, programmer, "
        "publisher, ranger, receptionist, referee, reporter, roofer, sculptor, secretary, shepherd, "
        "shoemaker, soldier, statistician, steward, surgeon, surveyor, tattooist, therapist, trader, "
        "trainer, valet, veterinarian, violinist, watchmaker, weaver, welder"
    ),
    "pet": words(
        "badger, bat, bear, beaver, bee, beetle, buffalo, butterfly, camel, carp, caterpillar, chameleon, "
        "chinchilla, chipmunk, cobra, cockatoo, cow, coyote, cricket, crow, deer, dingo, dove, falcon, "
        "finch, flamingo, fox, gecko, gerbil, giraffe, gorilla, guppy, hare, hawk, hedgehog, heron, horse, "
        "jackal, jay, kangaroo, kitten, koala, lamb, lemur, leopard, lion, llama, lobster, lynx, macaw, "
        "magpie, mole, monkey, moose, moth, mule, newt, panda, panther, peacock, pelican, penguin, "
        "pheasant, pigeon, porcupine, puma, puppy, python, quail, raccoon, rat, raven, reindeer, robin, "
        "salamander, scorpion, seal, skunk, sloth, snail, sparrow, squirrel, stork, swan, tarantula, tiger, "
        "toad, tortoise, trout, turkey, vulture, walrus, weasel, wolf, wombat, woodpecker, zebra"
    ),
    "birthday": words(
        "New Year's Eve, Christmas Eve, Christmas Day, Boxing Day, Easter Sunday, Easter Monday, Good "
        "Friday, Halloween, Midsummer Day, Labor Day, Mother's Day, Father's Day, Valentine's Day, "
        "Independence Day, Memorial Day, Thanksgiving, Ash Wednesday, Palm Sunday, Groundhog Day, Women's "
        "Day, Earth Day, Bastille Day, Epiphany, Leap Day, Columbus Day, Veterans Day, St Patrick's Day, "
        "Shrove Tuesday, Whit Monday, Diwali"
    ),
    "instrument": words(
        "bagpipes, balalaika, baritone, bassoon, bongos, bugle, carillon, castanets, celesta, chimes, "
        "concertina, congas, cornet, cymbals, dulcimer, euphonium, fiddle, fife, glockenspiel, gong, "
        "harmonica, harmonium, harpsichord, horn, kazoo, keyboard, koto, lute, lyre, mandolin, maracas, "
        "marimba, melodica, oboe, ocarina, panpipes, piccolo, recorder, sitar, spinet, synthesizer, "
        "tambourine, theremin, timpani, triangle, tuba, vibraphone, viola, whistle, xylophone, zither"
    ),
    "dish": words(
        "almonds, anchovies, apples, apricots, artichokes, asparagus, avocado, bacon, bagels, bananas, "
        "barley, biscuits, blueberries, broccoli, brownies, burgers, burritos, butter, cabbage, cake, "
        "caramel, carrots, cashews, cauliflower, caviar, celery, cereal, cherries, chestnuts, chocolate, "
        "clams, coconut, cod, cookies, couscous, crackers, cranberries, croissants, cucumber, custard, "
        "dates, doughnuts, duck, eggplant, falafel, fennel, figs, fondue, fries, fudge, garlic, ginger, "
        "gnocchi, goulash, granola, grapes, gravy, haddock, ham, hazelnuts, herring, honey, hummus, jam, "
        "jelly, kale, kebab, kiwi, lasagna, leeks, lemons, lentils, lettuce, liver, lobster, mango, "
        "marmalade, meatballs, melon, meringue, muffins, mussels, mustard, nachos, nougat, oatmeal, olives, "
        "omelette, onions, oranges, oysters, paella, papaya, parsnips, peaches, peanuts, pears, peas, "
        "pecans, peppers, pickles, pie, pineapple, pistachios, plums, polenta, popcorn, porridge, pretzels, "
        "pudding, pumpkin, quiche, radishes, raisins, raspberries, ravioli, rhubarb, risotto, sardines, "
        "sauerkraut, sausages, scallops, schnitzel, sherbet, spaghetti, spinach, squid, stew, strawberries, "
        "toast, toffee, tomatoes, trout, truffles, tuna, turnips, venison, walnuts, yogurt, zucchini"
    ),
    "purchase": words(
        "balloon, banjo, barrel, basket, bathtub, bed, belt, bench, bike, binder, boat, book, bottle, bowl, "
        "box, bracelet, broom, brush, bucket, cabinet, cage, calculator, calendar, candle, cane, canoe, "
        "canvas, cap, car, cart, chain, chair, chandelier, chest, coat, comb, compass, computer, couch, "
        "cradle, crib, crown, cup, curtain, cushion, dishwasher, doll, door, drill, drone, drum, fan, "
        "faucet, fence, flashlight, fork, fountain, frame, freezer, globe, glove, grill, hairdryer, "
        "hammock, handbag, harness, hat, heater, hoodie, hose, jar, jug, kite, knife, lantern, lawnmower, "
        "loom, magnet, map, mattress, microscope, microwave, motorbike, mug, necklace, needle, net, "
        "notebook, paddle, painting, pan, pen, pencil, pillow, pitcher, plate, plow, pocketknife, poster, "
        "pump, purse, puzzle, quilt, rake, razor, ring, robe, rope, rug, saddle, safe, sail, sandal, saw, "
        "scooter, screwdriver, sewing machine, shelf, shirt, shovel, skirt, sledge, spade, speaker, sponge, "
        "stapler, statue, stove, suitcase, sweater, sword, table, tablet, teapot, television, toaster, "
        "toolbox, toothbrush, torch, towel, toy, tractor, trailer, trampoline, tray, tricycle, tripod, "
        "trunk, typewriter, vacuum cleaner, van, vase, vest, wallet, wardrobe, wheelbarrow, whistle, yacht"
    ),
    "holiday": words(
        "Albania, Algeria, Angola, Argentina, Armenia, Australia, Bahrain, Bangladesh, Barbados, Belarus, "
        "Belgium, Belize, Bhutan, Bolivia, Bosnia, Botswana, Bulgaria, Burma, Cambodia, Cameroon, Chad, "
        "Colombia, Costa Rica, Croatia, Cyprus, Denmark, Dominica, Ecuador, England, Eritrea, Estonia, "
        "Ethiopia, Fiji, Gabon, Gambia, Georgia, Germany, Ghana, Grenada, Guatemala, Guinea, Guyana, Haiti, "
        "Honduras, Hungary, Indonesia, Iran, Iraq, Israel, Jamaica, Jordan, Kazakhstan, Korea, Kuwait, "
        "Laos, Latvia, Lebanon, Liberia, Libya, Lithuania, Luxembourg, Madagascar, Malawi, Malaysia, "
        "Maldives, Mali, Malta, Mauritius, Moldova, Monaco, Mongolia, Montenegro, Mozambique, Namibia, "
        "Netherlands, New Zealand, Nicaragua, Niger, Nigeria, Oman, Pakistan, Panama, Paraguay, "
        "Philippines, Qatar, Romania, Russia, Rwanda, Samoa, Scotland, Senegal, Serbia, Slovakia, Slovenia, "
        "Somalia, South Africa, Sri Lanka, Sudan, Switzerland, Syria, Taiwan, Tanzania, Thailand, Togo, "
        "Tonga, Tunisia, Uganda, Ukraine, Uruguay, Uzbekistan, Venezuela, Wales, Yemen, Zambia, Zimbabwe"
    ),
    "hobby": words(
        "acting, archery, astronomy, badminton, baking, ballet, baseball, basketball, birdwatching, "
        "blogging, boating, boxing, bridge, calligraphy, canoeing, carving, chess, cooking, cricket, "
        "crocheting, crosswords, darts, drawing, embroidery, fencing, football, gardening, golf, "
        "gymnastics, handball, hockey, ironing, jogging, judo, juggling, karate, kayaking, knitting, magic "
        "tricks, meditation, mountaineering, needlework, opera, origami, paragliding, photography, pilates, "
        "poetry, poker, pottery, puzzles, quilting, racing, reading, riding, rugby, sculpting, sewing, "
        "shooting, singing, sketching, sledding, snooker, snorkeling, soccer, softball, squash, stargazing, "
        "sudoku, tennis, theater, trampolining, trekking, volleyball, walking, weaving, weightlifting, "
        "welding, whittling, woodworking, wrestling, writing, yoga"
    ),
}
