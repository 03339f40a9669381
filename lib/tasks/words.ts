/**
 * The words that facts are made of. Each, with the space before it, is one token of the demo model's tokenizer
 * (a test holds it to that): a value is then said in one step, and a 6 M model can look it up by induction alone.
 */
const list = (words: string): readonly string[] => words.trim().split(/\s+/);

/** What a fact is about: names of codes, gifts and holders. Disjoint from VALUES. */
export const NAMES: readonly string[] = list(`
  amber coral jade ruby pearl onyx opal topaz quartz silver copper cobalt bronze nickel iron zinc ivory indigo violet
  scarlet crimson ebony hazel olive maple cedar birch willow aspen poplar walnut acorn laurel myrtle holly ivy fern
  clover thistle heather lotus lily tulip daisy poppy orchid rose iris basil sage thyme mint clove ginger pepper
  saffron nutmeg fennel river canyon valley meadow prairie island harbor lagoon glacier summit desert delta marsh
  forest tundra cavern ridge cliff brook spring geyser volcano reef oasis comet planet meteor galaxy nebula orbit
  aurora thunder zephyr breeze tempest monsoon sunset dawn dusk eclipse castle temple tower bridge tunnel chapel
  palace cabin cottage market museum station garden orchard vineyard mill forge tavern abbey manor cellar attic
  granite basalt slate chalk flint clay gravel pebble boulder sand ember cinder ash smoke flame spark frost icicle
  snow hail mist fog cloud rain shadow prism crystal mosaic velvet satin linen cotton wool silk denim canvas
  leather feather`);

/** What a fact says: the answers. Disjoint from NAMES. */
export const VALUES: readonly string[] = list(`
  falcon tiger wolf bear eagle otter badger beaver rabbit panda koala lemur monkey gorilla zebra giraffe camel llama
  donkey horse pony goat sheep lamb bison moose deer elk fox lynx puma jaguar leopard cheetah lion hyena jackal
  weasel ferret mole mouse hamster squirrel beetle spider hornet cricket moth locust lobster shrimp crab squid
  octopus dolphin whale shark salmon trout tuna herring pigeon parrot raven crow robin finch swan goose duck heron
  stork crane pelican penguin turkey quail gecko lizard cobra viper turtle tortoise frog toad apple banana cherry
  peach plum grape lemon mango papaya melon berry carrot potato tomato onion garlic celery radish turnip pumpkin
  spinach cabbage lettuce lentil rice wheat barley oat bread butter cheese yogurt honey syrup cookie muffin waffle
  noodle pasta pizza burger sausage bacon hammer ladder bucket basket candle lantern mirror pillow blanket curtain
  carpet kettle teapot saucer spoon fork knife bottle barrel anchor compass saddle helmet shield sword arrow dagger
  cannon violin guitar piano trumpet flute drum banjo ribbon button needle jacket mitten scarf sandal slipper wallet
  pencil crayon marble puzzle rocket wagon canoe kayak tractor`);

/** How many: a question names the count, so that the model need not notice an absence. */
export const COUNTS: readonly string[] = ["zero", "one", "two", "three", "four"];

/** Facts of which a book has at most one each ("The secret word is falcon."): the single needles. */
export const LONE: readonly string[] = [
  "secret word",
  "name of the ship",
  "old password",
  "sign on the door",
  "prize of the fair",
  "mark on the map",
  "toast of the evening",
  "title of the song",
  "crest of the guild",
  "favorite of the queen",
  "answer to the riddle",
  "toy in the window",
];
