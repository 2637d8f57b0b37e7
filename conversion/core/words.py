"""Words of the keys in recall documents that models are trained on. No word here may appear in an eval's keys."""

from __future__ import annotations

_ADJECTIVES = """
able ancient angry awful bare best big bitter black blind blue bold brave brief bright broad broken brown busy calm
careful certain cheap clean clear clever cold common cool cruel curious dark dead dear deep dense dirty distant double
dreadful dry dull early easy empty endless equal evil exact faint fair false famous fast fat fatal fierce final fine
firm flat foreign free fresh frozen full gentle glad golden good grand grave gray great green happy hard harsh heavy
hidden high holy honest hot huge human humble hungry ideal innocent kindred kind large last late lazy light little
lonely long loud low loyal lucky mad merry mighty mild modern narrow naked native neat new noble noisy odd old only
open pale patient perfect plain pleasant polite poor precious pretty private proud public pure quick quiet rapid rare
raw ready real red rich ripe rough round royal rude sacred sad safe scarlet secret serious severe sharp short shy
silent silver simple slender slight slow small smooth sober soft solemn solid sore steady steep stern stiff still
strange strict strong stupid sudden sweet swift tall tame tender terrible thick thin tidy tight tiny tired true ugly
upper useful vague vain violent warm weak wet white whole wicked wide wild wise wooden worthy yellow young
"""
_NOUNS = """
animal answer apple arm army arrow artist aunt autumn baby bag ball bank basket battle beach bear beard bed bee bell
bird blanket blood boat body bone book boot bottle bow box boy branch bread breath bride bridge brother brush bull
candle captain card carpet castle cat cave chain chair chapel child church circle city clock cloth cloud coach coast
coat coin color corn corner cottage country court cousin cow crowd crown cup curtain daughter dawn day deer desert
desk devil dinner doctor dog door dream dress drum duke dust eagle ear earth engine evening eye face family farm
father feast feather fence field finger fire fish flag flame flower fog forest fox friend frog fruit garden gate ghost
gift girl glass goat gold grass guard guest guide hair hall hand hat head heart hill hole home horn horse host hotel
hour house hunter husband inn iron island jewel journey judge key king kitchen knee knife knight lady lake lamb lamp
land lane law leaf leg lemon letter library lion lip lock lord machine maid map market master meadow meal metal milk
mill mirror money monk moon morning mother mountain mouse mouth music nail neck needle nest night nose nurse oak ocean
oil orange owl palace paper parlor path pen pencil people picture pig pine pipe pirate plant plate poem poet pony
prince prison queen rain river road robe rock roof room root rope rose sail sailor salt sand scholar school sea seat
servant shadow sheep shell ship shirt shoe shop shore sister skin sky sleep smoke snake snow soldier son song soul
spoon spring square stable stage stair star station steam stick stone storm story stove stranger stream street student
sugar summer sun sword table tail tailor teacher temple tent thief thing thread throne thunder tiger tooth tower town
train tree uncle valley village voice wagon wall war watch water wave wheat wheel wife wind window wine wing winter
wolf woman wood wool world yard
"""
ADJECTIVES: tuple[str, ...] = tuple(_ADJECTIVES.split())
NOUNS: tuple[str, ...] = tuple(_NOUNS.split())
TRAIN_WORDS: tuple[str, ...] = ADJECTIVES + NOUNS
