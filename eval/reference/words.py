"""Word lists of the reference corpus: common English words, chosen by hand."""

ADJECTIVES = tuple(
    """able amber angry arid bald basic bitter blank bleak blue blunt bold brave brief bright brisk broad broken brown
    calm careful cheap civil clean clear clever close cloudy cold common cool cosmic crisp cruel curly dark deep dense
    dry dull dusty eager early easy empty even exact faint fair false famous fancy fast fatal fierce final fine firm
    flat fond formal fresh frozen full funny gentle giant glad golden grand grave gray great green grim happy harsh
    heavy hollow holy honest huge humble hungry icy idle ivory jolly keen kind large late lazy light little lively
    local lonely long loud lovely loyal lucky mad major mellow mild minor misty modern modest muddy naive narrow neat
    noble noisy odd old pale patient perfect plain polite poor precise proud pure quick quiet rapid rare raw ready red
    rich rigid ripe rough round royal rude rural rusty sad safe salty secret sharp shiny short shy silent silver simple
    sleepy slim slow small smart smooth soft solid sour spare spicy steady steep stern stiff strange strong subtle
    sudden sunny sweet swift tall tame tart tender thick thin tidy tiny tired torpid tough true urban vague vast vivid
    warm weak weary wet white wide wild wise witty wooden young zealous""".split()
)
NOUNS = tuple(
    """acorn anchor apple arrow badge banana barrel basket beacon bell bench bird blanket blossom boat bottle bowl
    branch bread brick bridge broom brush bucket button cabin cable camel camera candle canoe carpet castle cat cellar
    chain chair chalk cherry chest circle cliff clock cloud coat coin comet compass copper corner cotton couch crane
    crayon crown cup curtain dagger daisy desk diamond dog donkey door dragon drawer dress drum duck eagle engine
    envelope falcon feather fence ferry fiddle finger flag flame flower flute forest fork fountain fox frame garden
    gate giraffe glove goat goose grape hammer harbor harp hat hawk helmet hill horse house island jacket jar jewel
    kettle key kite knife ladder lamp lantern leaf lemon letter lion lizard lock magnet maple marble mask meadow melon
    mirror mitten monkey moon motor mountain mouse needle nest net oar ocean olive onion orange orchid otter oven owl
    paddle page paint palace panda parrot peach pebble pencil penguin pepper piano pillow pine planet plate plow pocket
    pond potato puzzle quilt rabbit radio ribbon ring river robin rocket roof rope rose saddle sail salmon scarf seed
    shadow sheep shell ship shirt shoe shovel sled snail sock spider spoon squirrel stable star statue stone stove
    sugar sword table teapot tent thread tiger tomato tower train tray tree trumpet tulip tunnel turtle umbrella valley
    vase violin wagon wallet walnut watch whale wheel whistle window wolf zebra""".split()
)
NAMES = tuple(
    """Adam Agnes Alice Amir Anna Arthur Beth Boris Carla Carol Cyrus Daniel Daria David Diana Edgar Elena Emma Eric
    Felix Fiona Frank Gavin Grace Hanna Hector Helen Hugo Igor Irene Isaac Jack Jane Julia Karim Kate Laura Leo Lily
    Louis Lucy Marco Maria Martin Mina Nadia Nina Noah Nora Olga Oscar Paul Peter Quinn Rachel Ravi Robert Rosa Ruth
    Samuel Sara Simon Sofia Stella Thomas Tina Victor Vera Walter Wendy Xenia Yara Yusuf Zoe""".split()
)
PLACES = tuple(
    """airport attic bakery bank barn beach cafe capital cave cemetery church cinema city clinic college courtyard
    desert embassy factory farm gallery garage gym hallway hospital hotel inn kitchen laboratory library lighthouse
    market mill mine monastery museum office opera orchard park pier pharmacy port prison quarry restaurant school shop
    square stadium station studio suburb swamp temple theater town university village vineyard warehouse workshop
    zoo""".split()
)
JOBS = tuple(
    """actor artist author baker barber builder butcher carpenter chemist clerk cook dancer dentist doctor driver
    editor engineer farmer fisher gardener guard hunter judge lawyer librarian mason mechanic merchant miner nurse
    painter pilot plumber poet printer sailor scholar singer soldier tailor teacher waiter weaver writer""".split()
)
VERBS = tuple(
    """admired bought broke built carried caught cleaned closed counted covered described dropped dug fixed followed
    forgot found gave guarded heard held hid ignored kept kicked left lifted liked lost loved made met missed moved
    needed opened painted passed pulled pushed raised reached remembered repaired saw shared showed sold stole studied
    threw took touched traded turned used visited wanted washed watched wrapped""".split()
)
TOPIC_FIELDS = tuple(
    """architecture art biology business chemistry culture design economics education ethics future geography growth
    history language law literature meaning medicine music origin philosophy physics politics psychology religion
    science secret structure technology theory value""".split()
)
