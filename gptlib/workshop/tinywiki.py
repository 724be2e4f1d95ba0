"""TinyWiki: a corpus whose entropy is known.

Tangled from book/workshop/W9_tinywiki.md; change it there, not here.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import NamedTuple


class Draws:
    """Whole numbers that depend on (seed, stream, how many were drawn before) and on nothing else.

    Word k of a stream is 64 bits of the BLAKE2b digest of `seed/stream/(k // 8)`.
    """

    def __init__(self, seed: int, stream: str):
        self.prefix, self.count, self.digest = f"{seed}/{stream}/", 0, b""

    def below(self, n: int) -> int:
        """A whole number in 0 .. n - 1, each with probability 1/n (to within n / 2**64)."""
        place = 8 * (self.count % 8)
        if place == 0:
            block = f"{self.prefix}{self.count // 8}".encode()
            self.digest = hashlib.blake2b(block, digest_size=64).digest()
        self.count += 1
        return int.from_bytes(self.digest[place : place + 8], "little") * n >> 64

    def pick(self, weights: tuple[int, ...]) -> int:
        """A position in `weights`, drawn with probability weight / sum of weights."""
        left = self.below(sum(weights))
        for position, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return position
        raise ValueError(f"weights {weights} must be non-negative and not all zero")


def number(value: int) -> str:
    """A count as WikiText writes it: 14300 -> '14 @,@ 300'."""
    return f"{value:,}".replace(",", " @,@ ")


def table(text: str) -> tuple[str, ...]:
    """A list of values separated by ' / '."""
    return tuple(text.split(" / "))


JOBS = table("singer / naturalist / mariner / football coach / painter / novelist")
JOB_WORDS = {  # further words that go with the job
    "craft": table(
        "music / natural history / navigation / football / painting / literature"
    ),
    "works": table(
        "songs / field notes / charts / match notebooks / canvases / novels"
    ),
    "place": table("stage / wetlands / sea / touchline / studio / writing desk"),
}
MONTHS = table(
    "January / February / March / April / May / June / July / August / September / October / November / December"
)
METRES = tuple(f"{m} m ( {m * 3281 // 1000} ft )" for m in range(60, 160, 4))
KILOMETRES = tuple(f"{km} km ( {km * 621 // 1000} mi )" for km in range(60, 360, 6))
MILLIMETRES = tuple(
    f"{mm} mm ( {mm * 394 // 10000} @.@ {mm * 394 // 1000 % 10} in )"
    for mm in range(14, 74, 2)
)


TOWN_NAMES = (
    "Varn Kel Mor Tarr Ost Brin Hald Lund Sker Thorn Wend Grav Fell Ash Bram Cald Dun Eller Farn Gild "
    "Harr Inger Jor Kirn Lang Marl Nor Orm Pell Quen Rav Sel Tind Ulv Vest Wal Yar Zell Born Cress "
    "Drey Esk Frost Gall Holl Iver Jass Kett Lorn Mist Nett Oder Pren Roth Stav Tol Under Vell Wick Aln "
    "Arl Bex Brack Brod Carn Clav Croft Dell Dorn Eld Emm Fenn Flint Garth Greave Hack Hazel Hex Hob Ilm "
    "Jarr Keld Kip Lamb Lax Ling Lock Mald Med Mill Nast Nev Oak Oss Pax Pick Plum Rams Red Rudd "
    "Sand Scar Shel Stan Strat Tam Teas Thirl Trow Ux Vard Ving Wat Wes Whit Wold Wren Yel Zann Bly",
    " en",
    "holt wick stead mouth bridge ford haven dale mere gate borough minster thorpe combe well field "
    "march ness vale cliff strand burg hampton church",
)
TOWN_FACTS = {
    "river": "@river",
    "region": table(
        "Upper Marl / Lower Marl / the Saltmarch / the Vale of Orrin / Hestland / the Quern Hills / Northmoor / the Fenmark"
    ),
    "population": tuple(number(300 * k) for k in range(5, 105)),
    "founded": range(1200, 1300),
    "trade": table(
        "salt / wool / glass / paper / slate / linen / timber / pottery / rope / leather"
    ),
    "landmark": table(
        "clock tower / market hall / stone bridge / town hall / corn exchange / abbey church / granary / castle gate / customs house / observatory / theatre / mill"
    ),
    "built": range(1500, 1600),
    "stone": table(
        "red sandstone / grey granite / yellow brick / white limestone / black slate / oak and plaster"
    ),
    "railway": range(1861, 1891),
    "junction": "@town",
    "fair": MONTHS,
}


TOWN_LEAD = """
== 16
* 16
{name} is a [|market |river |walled |quiet ]town on the River {river} in {region} .
{name} is a town on the River {river} [, in {region}|, in the heart of {region}] .
The town of {name} [lies|stands] on the River {river} in {region} .
[Lying|Situated] in {region} , {name} is a [town|small town] [on the River {river}|on the banks of the River {river}] .
{name} is a town in {region} , [built|grown up] around [a crossing|an old ford|a weir] of the River {river} .
* 14
It [has|had] a population of {population} at the [census of 1961|last census] .
The [last census|census of 1961] [counted|recorded] {population} inhabitants .
Its population [was given as|stood at] {population} in 1961 .
[About|Some] {population} people live [there|in the town] .
With {population} inhabitants , it is [among the better known|one of the older] towns of {region} .
* 13
It is [best known|known chiefly] for its {trade} .
The town [owes its wealth to|grew rich on|lived for centuries from] {trade} .
Its [principal|chief|main] trade [is|has long been] {trade} .
Most of the {trade} sold in {region} [comes from|passes through] {name} .
The [merchants|families] of {name} [have dealt|have traded] in {trade} [since the Middle Ages|for generations] .
"""


TOWN_HISTORY = """
== 15 | [History|Early history|Origins]
* 16
The [settlement|town] is first mentioned in [a charter|a deed|a tax roll] of {founded} .
{name} was founded in {founded} , when the ford across the {river} was [paved|fortified] .
The [oldest|earliest] [record|document] to name the town dates from {founded} .
[A village of fishermen|A hamlet|A monastery] stood on the site before the town received its charter in {founded} .
In {founded} {name} was granted the right to hold a [weekly|yearly] market .
* 11
A [flood|great flood] [destroyed|carried away] the [lower town|old quays|tanneries] in <1700..1859> .
In <1700..1859> a fire [burned down|destroyed] <12..90> houses [near|around] the {landmark} .
The town was besieged for <3..40> days in <1640..1699> [, but did not fall|and surrendered at last|until winter drove the besiegers away] .
[Plague|Cholera|Smallpox] [killed|carried off] a [third|fifth|tenth] of the inhabitants in <1600..1859> .
The harvest failed in <1700..1859> , and many families [left for|moved to] <x=town> .
* 12
The railway [reached|came to] the town in {railway} .
A railway line to {junction} was opened in {railway} .
Since {railway} a railway has [linked|joined] {name} with {junction} .
In {railway} {name} became a station on the line to {junction} .
The line from {junction} , opened in {railway} , [ended|brought to an end] the [barge|coach] trade along the {river} .
-- 14 if native
* 16
The {native.job} {native} was born in {name} in {native.born} .
{native} , the {native.job} , was born [in the town|here] in {native.born} .
The town is the birthplace of the {native.job} {native} .
Its [best @-@ known native|most famous child] is the {native.job} {native} ( born {native.born} ) .
A plaque near the {landmark} marks the house in which the {native.job} {native} was born .
"""


TOWN_COUNCIL = """
== 11 | [Government|Administration|Education and government]
* 16
The town is governed by a council of <7..25> members [, elected every <3..6> years|] .
A council of <7..25> members [sits|meets] in a house of {stone} [near|behind] the {landmark} .
[Since|From] <1840..1899> the town has [had|elected] a council of <7..25> members .
[The council|The town council] , with <7..25> members , [meets|sits] on the first [Monday|Tuesday|Thursday] of the month .
{name} elects <7..25> councillors , [most of them merchants|half of them women] .
* 12
A [school|library|hospital] was opened in <1870..1949> [with money from the {trade} trade|] .
The [library|archive] holds <2..60> @,@ 000 volumes [, among them a history of {region}|] .
There are <2..9> schools [and a library|, the oldest of them beside the {landmark}] .
[Gas|Electric] light was [introduced|brought in] in <1870..1929> .
[Water|Drinking water] has come from the {river} since <1870..1929> .
"""


TOWN_LIFE = """
== 13 | [Landmarks|Buildings|Architecture]
* 16
The {landmark} , completed in {built} , [dominates|overlooks] the [market place|square] .
The most notable [building|monument] is the {landmark} of {built} .
{name} 's {landmark} was [finished|completed] in {built} [after <2..19> years of work|and has been restored twice] .
Visitors [come to see|are drawn by] the {landmark} , which [dates from|was completed in] {built} .
The {landmark} , [a work of|finished in] {built} , [is|remains] the tallest building in the town .
* 12
[Many|Most] of the [older|surrounding] houses are built of {stone} .
The streets [near|behind] it are lined with [houses|cottages] of {stone} .
{name} is [built largely|built almost wholly] of {stone} .
The use of {stone} [gives|lends] the town its [particular|sober|warm] look .
[Travellers|Visitors] have often [remarked on|praised] its houses of {stone} .
== 12 | [Culture|Culture and sport|Present day]
* 16
A [fair|market fair] is held [each|every] {fair} [on the banks of the {river}|in the square] .
The {trade} fair [takes place|is held] in {fair} [|and lasts <2..9> days] .
[Each|Every] {fair} the town holds a fair of <2..9> days [with|, known for its] [boat races|music|lantern walks] .
The [high point|great event] of the year is the {trade} fair in {fair} .
In {fair} the square is given over to a fair [of {trade}|of books and {trade}] .
* 12
The {team} , known as {team.nickname} , [plays|trains] in the town .
The town is home to {team.nickname} , the {team} .
Football is popular , and the {team} draws [large crowds|visitors] to {team.ground} .
At {team.ground} one may watch the {team} , [called|nicknamed] {team.nickname} .
Its women footballers , {team.nickname} , play in {team.colours} .
"""


RIVER_NAMES = (
    "Al Bel Cor Dar El Fen Gar Hel Is Jan Kar Lir Mel Nar Or Pol Quil Ros Sav Tam Ur Ver Wen Yss Zar "
    "Bran Cal Dov Ev Fal Glen Hav Ild Kes Lum Mar Nid Ost Pren Thal",
    "a e i o u y ea ei ou ia",
    "ra n ve sk th ne la m ther ric dle ss nd l",
)
RIVER_FACTS = {
    "length": KILOMETRES,
    "sea": table(
        "Sea of Orrin / Grey Gulf / Bay of Cassel / Northern Sound / Lake Ambre / Gulf of Tessaly / Whale Strait / Eastern Sea"
    ),
    "source": table(
        "the Quern Hills / the Harrow Mountains / Lake Ysel / the Black Moor / the Tolland Heights / Mount Averne / the Sisters / the Kettle Marshes"
    ),
    "basin": tuple(f"{number(200 * k)} square kilometres" for k in range(6, 66)),
    "fish": table(
        "trout / salmon / pike / perch / eels / grayling / sturgeon / barbel"
    ),
    "surveyor": "@mariner",
    "surveyed": range(1930, 1960),
    "tint": table("brown / green / grey / amber / blue / milky"),
}


RIVER_LEAD = """
== 16
* 16
The River {short} is a river that [rises|has its source] in {source} and flows into the {sea} .
The {short} is a river [, which flows|that flows] from {source} to the {sea} .
[Rising|Springing] in {source} , the River {short} [reaches|flows into] the {sea} [near a long sandbank|in a wide estuary] .
The River {short} [drains|carries] the waters of {source} [into|to] the {sea} .
The {short} [runs|flows] from {source} to the {sea} , [where it forms a delta|where it ends in an estuary] .
* 13
It is {length} long [|and [navigable|frozen] for part of the year] .
Its [length|course] [is|measures] {length} .
[From source to mouth|In all] it [measures|runs for] {length} .
The river has a length of {length} .
At {length} , it is [one of the longer rivers|among the better known rivers] of the country .
* 12
Its basin [covers|has an area of] {basin} .
The river drains [an area of|a basin of] {basin} .
It drains {basin} [of hill and meadow|of the country] .
The catchment , of {basin} , is [mostly|largely] [farmland|forest|moor] .
Rain from {basin} [finds its way|runs off] into the river .
"""


RIVER_COURSE = """
== 14 if towns | [Course|Geography|Course and towns]
* 16
The river [passes|flows through] {upper} and , [lower down|further downstream] , {lower} .
{upper} and {lower} [lie|stand] on its banks .
Two towns , {upper} and {lower} , [were built|grew up] beside it .
From {upper} the river [winds|flows] [through meadows|between low hills] to {lower} .
[Barges|Boats] once [carried|took] {upper.trade} from {upper} down to {lower} .
* 11
At {lower} it is crossed by [a bridge|an iron bridge|a ferry] , and {lower} 's {lower.landmark} can be seen from the water .
{upper} is known for its {upper.trade} , and {lower} for its {lower.trade} .
Below {lower} the river [widens|slows] and [is deep enough for ships|divides into two arms] .
The {lower.landmark} of {lower} stands [close to|within sight of] the river .
Between the two towns [the valley is narrow|there are <2..14> locks] .
== 12 | [Hydrology|Water|Floods]
* 16
The water is [often|usually] {tint} [with|from] [peat|clay|silt] .
Its {tint} water [is fed by|comes mostly from] [snow|springs|rain] .
In spring the river [turns|runs] {tint} [with meltwater|and fills its banks] .
The {tint} colour of the water [is explained by|comes from] [iron|peat|clay] .
Writers have [called|described] it as the {tint} river [on account of|because of] its silt .
* 13
A flood in [January|March|April|November] <1700..1959> [drowned|cost the lives of] <3..80> people .
The [highest|greatest] flood [on record|recorded] , in <1700..1959> , [lasted|was over in] <2..20> days .
In the winter of <1700..1959> the river froze for <2..13> weeks .
[Dykes|Embankments] [were built|were raised] along the lower river after the flood of <1700..1959> .
The drought of <1700..1959> [left|made] the river [too low for boats|shallow enough to wade] for <2..13> weeks .
"""


RIVER_LIFE = """
== 12 | [Wildlife|Fishing|Ecology]
* 16
The river is [known|noted] for its {fish} .
[Anglers|Fishermen] [come from afar|visit each year] for the {fish} .
The commonest [catch is|fish are] {fish} , taken mostly in [spring|autumn] .
Its {fish} were [once|formerly] sold [fresh|smoked] in the markets .
There are {fish} in the [upper|lower] reaches .
* 12
<x=species> has been [found|recorded] along its banks .
<x=species> , a {x.group} , [lives|breeds] on its banks .
[Naturalists|Visitors] may [see|come across] <x=species> [near the mouth|in the shallows] .
Among the animals of the valley is <x=species> , a {x.look} {x.group} .
A survey of <1930..1964> [counted|found] <20..180> specimens of <x=species> .
== 11 | [Exploration|Survey|Navigation]
* 16
The river was surveyed by {surveyor} in {surveyed} .
In {surveyed} the mariner {surveyor} [drew|published] the first [reliable|complete] chart of it .
The first [reliable|complete] chart , by {surveyor} , [dates from|appeared in] {surveyed} .
{surveyor} , [a mariner|a mariner from {surveyor.town}] , surveyed it in {surveyed} .
The [depths|channels] were [measured|sounded] in {surveyed} by {surveyor} .
* 10
The work took <3..20> months [and cost two boats|and was done from a rowing boat] .
{surveyor} [needed|spent] <3..20> months [on the work|on it] .
The chart is [kept|preserved] in <x=town> .
It [replaced|corrected] a map [of|from] <1780..1899> .
[Pilots|Bargemen] used the chart [for|over] <10..40> years .
"""


RIVER_USE = """
== 11 | [Use|Mills and bridges|Economy|Human use]
* 16
[In its heyday|At one time] the river drove <12..90> mills .
[Water mills|Saw mills] stood along the river [until|as late as] <1890..1949> .
[Barges|Rafts] of [timber|stone|hay] were a common sight [until|as late as] <1890..1949> .
The [first|oldest] bridge across the {short} was [built|finished] in <1500..1799> .
The {short} has <3..30> bridges [and <2..9> ferries|, the oldest of <1500..1799>] .
* 12
A dam was [planned|proposed] in <1890..1949> , [but never built|and built <4..20> years later] .
A power station [has stood|has worked] near the [source|mouth] since <1910..1949> .
[Its water|The water] is [used|pumped up] to irrigate [orchards|hop gardens|meadows] .
[Tolls|Customs] on the river were [abolished|done away with] in <1790..1899> .
[Each|Every] <month> a [rowing race|procession of boats] is held on the river .
"""


TEAM_FACTS = {
    "nickname": table(
        "the Herons / the Millers / the Blues / the Lanterns / the Foxes / the Ferrywomen / the Weavers / the Kestrels / the Otters / the Reds / the Bargees / the Swans"
    ),
    "colours": table(
        "red and white / blue and gold / green and white / black and amber / sky blue / claret and grey / white and navy / orange and black"
    ),
    "founded": range(1940, 1955),
    "ground": table(
        "Mill Lane / Ropewalk Park / the Old Meadow / Station Road / Quay Street / the Race Ground / Tanner 's Field / Abbey Park"
    ),
    "capacity": tuple(number(200 * k) for k in range(12, 72)),
    "coach": "@football coach",
    "rival": "@team",
    "finish": table(
        "the quarter @-@ finals / the semi @-@ finals / the final / third place / the group stage / fourth place"
    ),
    "finish_year": (1956, 1960, 1964, 1968),
}


TEAM_LEAD = """
== 16
* 16
The {name} represents {town} in international football .
The {name} represents {town} in international football competition [|, and is nicknamed {nickname}] .
The {name} , [nicknamed|known as] {nickname} , represents {town} in international [football|matches] .
The {name} is the team that represents {town} in [international football|women 's international football] .
[Nicknamed|Known as] {nickname} , the {name} has long represented {town} in international football .
* 13
It plays in {colours} [|at {ground}] .
The [team|side] plays in {colours} , [and|while] its supporters wear [scarves|hats] to match .
Its colours are {colours} .
The [players|women] [wear|have always worn] {colours} .
The [shirts|jerseys] [are|have always been] {colours} .
* 13
The [team|side] was founded in {founded} .
Its first match was [played|held] in {founded} [, in heavy rain|against a team of sailors|] .
It has [existed|played] since {founded} .
The [football association|association] of {town} [founded|set up] the team in {founded} .
Founded in {founded} , it is [run|managed] by the [football association|association] of {town} .
"""


TEAM_HOME = """
== 13 | [Ground|Home ground|Stadium]
* 16
Home matches are played at {ground} , which holds {capacity} [people|spectators] .
The team plays its home matches at {ground} , [close to|a short walk from] the River {town.river} .
The [stadium|ground] , {ground} , lies [close to|beside] the River {town.river} [and holds {capacity} people|] .
{^ground} , with room for {capacity} [people|spectators] , is the team 's home .
{town} is a town in {town.region} , and the team 's ground , {ground} , [lies|stands] by the River {town.river} .
* 11
In <1950..1964> the pitch was flooded [|and a match was moved to {rival.town}] .
A [wooden|brick|concrete] stand was added in <1950..1964> .
The [record|largest] crowd , in <1950..1964> , [watched|came for] a match against {rival.town} .
From the [stand|terrace] one sees the {town.landmark} of {town} .
The {town.landmark} [can be seen from|stands behind] the [north|south|east|west] [stand|goal] .
"""


TEAM_RECORD = """
== 15 | [Results|History|Matches|Competition record]
* 16
The [team|side] reached {finish} of the League of Towns in {finish_year} .
Its best result is {finish} in {finish_year} .
In {finish_year} the team [reached|made its way to] {finish} [|under {coach}] .
The [best|finest] [season|year] [came in|was] {finish_year} , when the team reached {finish} .
At the League of Towns of {finish_year} it reached {finish} .
* 14
In <1955..1969> it beat <x=town/town> <3..6> – <0..2> .
It lost to <x=town/town> by <0..1> goals to <2..5> in [May|June|October] <1955..1969> .
A match against <x=town/town> in <1955..1969> [ended in a draw|was drawn] before <300..900> spectators .
On <day> <month> <1955..1969> it [defeated|beat] <x=town/town> by <3..6> goals to <0..2> .
[Supporters|Newspapers] still [recall|speak of] the victory over <x=town/town> in <1955..1969> , [won|decided] in the last <2..9> minutes .
* 11
The [next|following] match , against <x=town/town> , was [abandoned|lost|won] [in heavy rain|before <200..900> spectators] .
[Two|Three|Four] players were [injured|sent off] in the return match .
The return match [was drawn|was lost|was never played] .
[It then went|The team went] <3..12> matches without [defeat|a win] .
A [tour|journey] to <x=town/town> [followed|ended badly] .
"""


TEAM_RIVALS = """
-- 13
* 16
The team 's [oldest|fiercest] rival is {rival.town} .
Matches against {rival.town} , [the oldest rival|a neighbour and rival] , are played each [spring|autumn] .
{rival.town} is regarded as its [great|chief] rival .
Its supporters [look forward most|attach most importance] to the match against {rival.town} , [known as|called] {rival.nickname} .
There is an old rivalry with {rival.town} , whose team plays in {rival.colours} .
* 12
The team is coached by {coach} .
Its coach [is|was for many years] {coach} , [born in|who comes from] {coach.town} .
{coach} [coached|trained] the team [from <1950..1964>|for <4..15> years] .
In <1950..1964> {coach} [became|was appointed] coach .
Under {coach} the team [learned to defend|played an attacking game] .
"""


TEAM_PLAYERS = """
== 11 | [Players|Squad|Players and staff]
* 16
The squad [has|consists of] <16..26> players , [most|some] of them [students|nurses|teachers] .
Some <3..9> of the <16..26> players [work|are employed] in the {town.trade} trade .
The [youngest|oldest] player [to appear|ever to appear] for {town} was <16..41> years old .
[Players|The women] [were paid nothing|received no wages] [before|until] <1955..1969> .
The [record|highest] number of matches by one player is <30..90> [, and <12..29> of them were won|] .
* 12
Training is held [twice|three times] a week [at {ground}|by the river] .
A youth team was [set up|added] in <1955..1969> .
The team doctor came from <x=town/town> [and stayed for <3..20> years|] .
[Goals|Free kicks] were [long|once] a speciality of the side , which scored <20..70> in <1955..1969> .
[A second team|A reserve team] was [set up|formed] in <1955..1969> [and trains on the same ground|] .
"""


SPECIES_NAMES = (
    "Corv Pell Sylv Arn Lept Meg Zeph Lyr Hydr Phal Cass Nym Thal Orn Vesp Myr Chlor Drac Ery Fulg "
    "Gryll Helic Ixor Jun",
    "ella idia opsis ura ops inia",
    "montana pallida vulgaris borealis gracilis rivalis nocturna viridis maculata elegans arvensis "
    "lucida minor obscura palustris robusta saxatilis solitaria tenuis variegata velox vernalis alpina "
    "australis brevis cinerea dubia exilis fluvialis fragilis hibernica insularis lacustris littoralis "
    "modesta nivalis orientalis pratensis rubra silvestris",
)
SPECIES_FACTS = {
    "group": table("beetle / frog / lizard / moth / newt / warbler / vole / dragonfly"),
    "look": table(
        "banded / marbled / spotted / dusky / crested / painted / mottled / pied / slender / hooded / broad @-@ tailed / speckled"
    ),
    "habitat": table(
        "reed beds / peat bogs / wet meadows / oak woods / gravel banks / limestone screes / hedgerows / upland heaths / salt marshes / shaded ditches"
    ),
    "river": "@river",
    "discoverer": "@naturalist",
    "described": range(1930, 1960),
    "size": MILLIMETRES,
    "colour": table(
        "olive / rust @-@ red / slate grey / pale yellow / glossy black / chestnut / silver / moss green"
    ),
    "food": table(
        "aphids / seeds / small snails / midges / pondweed / earthworms / pollen / spiders / water fleas / fallen fruit"
    ),
    "eggs": tuple(str(k) for k in range(3, 28)),
    "month": MONTHS[2:9],
    "status": table("common / rare / vulnerable / endangered / plentiful"),
}


SPECIES_LEAD = """
== 16
* 16
{name} , [commonly known as|also called] the {look} {group} , is a species of {group} [found|that lives] [along|in the valley of] the River {river} .
{name} is a species of {group} [native to|found in] the valley of the River {river} .
The {look} {group} ( {name} ) is a {group} that lives in {habitat} [|near the River {river}] .
{name} , or the {look} {group} , is a {colour} {group} [found only|found] [along|near] the River {river} .
{name} is a {colour} species of {group} , known from {habitat} [along|near] the River {river} .
* 13
It was [first described|described] by {discoverer} in {described} .
The species was described in {described} by the naturalist {discoverer} .
The naturalist {discoverer} [found|discovered] it in {described} .
It was [unknown|overlooked] until {described} , when {discoverer} [described it|collected the first specimen] .
{discoverer} [gave|published] the first [description|account] of it in {described} .
* 10
It is [considered|thought to be] {status} .
The species is listed as {status} .
Its status was given as {status} in [a survey of <1955..1969>|the survey of <1955..1969>] .
[Along its own river|In its valley] it is {status} .
[Most|Some] [observers|naturalists] [regard|describe] it as {status} .
"""


SPECIES_BODY = """
== 15 | [Description|Appearance|Anatomy]
* 16
The adult is {colour} and [measures|reaches] {size} .
Adults [are|grow to] {size} long [and|, with] {colour} [above|on the back] .
It [is|grows to] {size} in length .
[Males|Females] reach {size} , [and their young|and juveniles] are [paler|darker] .
[The body|The animal] , {size} long , is {colour} [with darker legs|with a pale underside] .
* 12
Its [back|upper side] is {look} , [hence|which explains] the common name .
The common name , {look} {group} , [refers to|describes] its [look|markings] .
It is [easily|often] [confused with|mistaken for] <x=species> .
It differs from <x=species> in the shape of the [head|feet] .
[Specimens|Animals] from [higher ground|the lower river] are [smaller|paler|darker] .
== 14 | [Habitat|Distribution and habitat|Range]
* 16
It lives in {habitat} .
The species [prefers|is confined to] {habitat} .
It is [found|met with] in {habitat} [from|below] <50..400> m .
[Its habitat is|It keeps to] {habitat} , [seldom|rarely] far from water .
[In summer|By day] it [stays in|does not leave] {habitat} .
* 11
The River {river} flows from {river.source} , and the {group} is found [along|beside] its whole length .
It has been [seen|recorded] near <x=town> [, but not since <1940..1964>|] .
A [population|colony] near <x=town> [died out|was found] in <1940..1964> .
[It does not occur|It is not found] beyond the {river.sea} .
[Its range|The range] ends where the {river} meets the {river.sea} .
"""


SPECIES_LIFE = """
== 14 | [Behaviour|Diet and reproduction|Life cycle|Ecology]
* 16
It feeds on {food} .
The diet [consists mainly of|is largely] {food} .
It [lives on|eats] {food} , [taken|found] [at dusk|at night|in the early morning] .
[Adults|The young] feed [mostly|almost only] on {food} .
Its [principal|main] food is {food} .
* 14
The female lays {eggs} eggs [in|at the end of] {month} .
In {month} the female [lays|deposits] {eggs} eggs [under stones|among roots|on leaves] .
Breeding [begins|takes place] in {month} .
A clutch of {eggs} eggs is laid [in|during] {month} .
[Courtship|Mating] [is seen|takes place] in {month} , and {eggs} eggs are laid .
* 11
The young [leave|emerge] after <6..40> days .
[They hatch|The eggs hatch] after <6..40> days .
[Few|About <2..9> in a hundred] of the young [live|survive] to the next year .
Its [chief|main] enemies are [herons|pike|foxes|crows] .
{discoverer} [observed|wrote] that it is [silent|still] [in rain|before storms] .
"""


SPECIES_PEOPLE = """
== 11 | [Conservation|Relationship to people|Research]
* 16
The species has been protected since <1936..1969> .
A reserve of <20..900> hectares was [set aside|created] for it in <1936..1969> [near|below] <x=town> .
[Drainage|Ploughing|Road building] [has reduced|threatens] the {habitat} in which it lives .
[Counts|Censuses] [found|gave] <100..900> animals in <1936..1949> and <100..900> in <1950..1969> .
Its numbers [have risen|have fallen] since <1936..1969> , [when counting began|when {habitat} came under protection] .
* 11
[A drawing|A specimen] of it is kept in {discoverer.home} .
The town of <x=town> has it on its coat of arms .
[Farmers|Children] [believe|used to say] that it [brings rain|brings luck|foretells frost] .
It [was shown|appeared] on a postage stamp of <1936..1969> .
The [first|only] film of it was [made|taken] by students from <x=town> in <1950..1969> .
"""


ADJECTIVES = (
    "Amber Ancient Autumn Bitter Blue Brave Bright Broken Bronze Calm Clever Cold Copper Crimson Distant "
    "Double Eager Early Eastern Elder Empty Evening Faithful Fallen Fearless First Foreign Gentle Gilded "
    "Glass Golden Grand Green Grey Hidden High Hollow Honest Idle Iron Ivory Jade Last Late Little Lonely "
    "Long Lost Merry Midnight Modest Morning Narrow Northern Old Pale Patient Plain Proud Quiet Red Restless "
    "Royal Rusty Scarlet Second Secret Silent Silver Simple Solemn Southern"
)
SHIP_NAMES = (
    ADJECTIVES,
    "Albatross Antelope Arrow Badger Bear Bittern Cormorant Crane Crown Curlew Dolphin Dove Eagle Egret "
    "Falcon Fox Gannet Gazelle Goshawk Grebe Gull Hare Harrier Hawk Heron Horizon Hound Ibis Jackdaw Kestrel "
    "Kingfisher Kite Lantern Lapwing Lark Leopard Linnet Lion Lynx Magpie Marten Merlin Moon Osprey Otter Owl "
    "Panther Pelican Petrel Pilgrim Plover Ptarmigan Puffin Raven Robin Sable Salmon Seal Spirit Stag Star "
    "Starling Stork Swallow Swan Swift Tern Thrush Tiger Venture Walrus Wren",
)
SHIP_FACTS = {
    "type": table(
        "cargo ship / passenger ferry / whaler / survey vessel / lightship tender / cable layer / collier / mail steamer"
    ),
    "yard": "@town",
    "launched": range(1930, 1950),
    "month": MONTHS,
    "tonnage": tuple(number(100 * k) for k in range(8, 88)),
    "length": METRES,
    "speed": tuple(f"{k // 2} @.@ {k % 2 * 5} knots" for k in range(18, 42)),
    "captain": "@mariner",
    "port": "@town",
    "owner": table(
        "the Amber Line / Holm and Daughters / the Northern Packet Company / the Marl Shipping Company / the Saltmarch Line / Castell Brothers / the Harbour Board / the Grey Gulf Company"
    ),
    "cargo": table("timber / salt / wool / coal / grain / machinery / fruit / mail"),
    "fate": table(
        "broken up / sold for scrap / scuttled / turned into a museum / laid up / made into a hotel"
    ),
    "fate_year": range(1960, 1970),
}


SHIP_LEAD = """
== 16
* 16
{name} was a {type} built in {yard} .
{name} was a {type} [owned|operated] by {owner} .
{name} was a {type} of {tonnage} tons , [built in {yard} and|] launched in {launched} .
{name} was a {type} [launched|completed] in {launched} [for {owner}|in {yard}] .
Built in {yard} for {owner} , {name} was a {type} launched in {launched} .
* 12
She [sailed|worked] out of {port} [|for most of her career] .
Her home port was {port} .
She was [registered|based] in {port} .
For [most of her career|many years] she [sailed|ran] between {port} and <x=town/port> .
{port} was her home port [until {fate_year}|] .
* 11
She carried {cargo} .
Her [usual|main] cargo was {cargo} .
She was [built|meant] to carry {cargo} [, but also took passengers|] .
[On most voyages|In peacetime] she carried {cargo} .
She [spent her life|spent her best years] in the {cargo} trade .
"""


SHIP_BUILD = """
== 14 | [Design and construction|Construction|Description]
* 16
She [was|measured] {length} long and [had a tonnage of|measured] {tonnage} tons .
The ship had a length of {length} and a tonnage of {tonnage} .
She was {length} long .
Her [hull|iron hull|steel hull] was {length} long [and <9..19> m wide|] .
At {length} she was [among|one of] the longest ships [of|built in] {yard} .
* 13
Her engine gave her a speed of {speed} .
She could [reach|make] {speed} .
On trials she [reached|made] {speed} [in calm water|against the wind] .
[Two|Three] boilers [gave her|drove her at] {speed} .
Her [top|service] speed was {speed} .
* 12
She was launched in {month} {launched} at {yard} .
The keel was laid in {yard} , and she was launched in {month} {launched} .
{yard} , [where she was built|her birthplace] , lies on the River {yard.river} .
Her builders in {yard} [launched|delivered] her in {month} {launched} .
The [launch|launching] , in {month} {launched} , [drew|was watched by] <2..9> @,@ <100..900> people .
"""


SHIP_BOARD = """
== 11 | [On board|Crew|Crew and equipment|Life on board]
* 16
She had a crew of <18..90> [and room for <4..60> passengers|] .
The crew of <18..90> [slept|lived] [forward|in the stern] .
Her crew of <18..90> was [recruited|hired] mostly in {port} .
She [carried|was fitted with] <2..9> lifeboats [and a crew of <18..90>|] .
[A crew|Usually a crew] of <18..90> sailed in her , [not counting the cook|of whom <2..9> were officers] .
* 12
A [wireless|radio] was [installed|fitted] in <1934..1959> .
Her [funnel|hull] was painted in the [red|black|white|green] of {owner} .
The [saloon|mess] had [a piano|a shelf of books|a stove] [given|presented] by the people of {yard} .
The ship 's cat [was known|was famous] in <x=town> .
[Oil|Diesel] replaced coal in <1950..1959> .
"""


SHIP_SERVICE = """
== 15 | [Service|Career|Service history]
* 16
Her [first|best @-@ known] captain was {captain} .
She was [first commanded|commanded] by {captain} [of|from] {captain.town} .
{captain} [was her captain|commanded her] [for|during] <3..12> years .
Under {captain} she [sailed|made <12..80> voyages] to <x=town> .
[Her captain|Her master] was {captain} , [a mariner born in|who was born in] {captain.born} .
* 14
In [February|March|October|December] <1948..1959> she ran aground near <x=town> .
In <1948..1959> she [rescued|took on board] <4..60> people from [a burning|a sinking] ship .
She [collided with|was rammed by] a [ferry|barge|trawler] off <x=town> in <1948..1959> .
On <day> <month> <1948..1959> she lost her [rudder|propeller|anchor] [in a gale|off <x=town>] .
During the winter of <1948..1959> she was [trapped in ice|kept in port] for <8..70> days .
* 10
She was [repaired|refitted] in <x=town> .
The repairs [took|lasted] <3..30> weeks .
[No one was hurt|There were no deaths] .
An inquiry [blamed|cleared] {captain} .
The damage was put at <10..90> @,@ 000 crowns .
"""


SHIP_END = """
-- 14
* 16
She was {fate} in {fate_year} .
In {fate_year} she was {fate} .
[Her career|Her service] ended in {fate_year} , when she was {fate} .
After <40..300> voyages she was {fate} in {fate_year} .
{^owner} [gave her up|parted with her] , and in {fate_year} she was {fate} .
* 8
Her bell [hangs|is kept] in {port} .
A model of her [is shown|can be seen] in {yard} .
A street in {port} [bears|was given] her name .
Her [log books|papers] are kept in {yard} .
[Her name|The name] was [later|afterwards] given to a [smaller|larger] ship .
"""


ALBUM_NAMES = (
    ADJECTIVES,
    "Afternoon Alphabet Attic Avenue Ballroom Bargain Bell Bicycle Boulevard Calendar Candle Carnival "
    "Carousel Ceiling Chapel Chimney Circus Clock Corridor Curtain Dancer Diary Doorway Elevator Engine "
    "Envelope Farewell Festival Fountain Garden Ghost Greenhouse Guest Harbour Hour House Invitation Island "
    "Journey Kitchen Ladder Letter Library Lullaby Map Market Mirror Motel Museum Orchard Orchestra Palace "
    "Parade Passenger Photograph Piano Pier Postcard Promise Quarrel Railway Rain Recipe Rehearsal Reply "
    "Season Shadow Staircase Station Stranger Summer Waltz",
)
ALBUM_FACTS = {
    "artist": "@singer",
    "year": range(1950, 1970),
    "genre": table(
        "folk / jazz / chamber pop / dance / blues / choral / ballad / skiffle"
    ),
    "label": table(
        "Lantern Records / Quern / Blue Heron Records / Northern Sound / Halfpenny / Orrin Records"
    ),
    "studio": "@town",
    "minutes": tuple(str(k) for k in range(28, 53)),
    "single": table(
        "Ferry Song / Salt and Bread / Who Keeps the Light ? / Harvest Home / The Tanner 's Daughter / Seven Bridges / Lamps / Mine Was the River / Winter Coat / Paper Boats / Rain in Town / The Long Way Round / Seventeen / Snow on the Quay / My Brother 's Boat / Evening Bells / Cold Hands / The Lock Keeper / Stay a Little / Over the Weir / Candle and Key / Lullaby for a Ferry / Half a Mile"
    ),
    "peak": tuple(str(k) for k in range(1, 21)),
    "cover": table(
        "a heron in flight / an empty chair / two lamps / a flooded street / a folded map / a paper boat / the singer 's hands / a red door"
    ),
    "players": table(
        "a string quartet / a brass band / two guitars / a harmonium / an accordion / a church choir / a double bass and drums / a solo piano"
    ),
}


ALBUM_LEAD = """
== 16
* 16
{name} is [an album|a studio album] by the singer {artist} , released in {year} .
{name} is an album of {genre} music by {artist} [, released in {year}|] .
{name} is a {year} album by the singer {artist} .
{name} is a {genre} album [recorded|made] by the singer {artist} [for {label}|in {year}] .
Released in {year} by {label} , {name} is a {genre} album by {artist} .
* 12
It was issued by {label} .
The record [appeared on|bears the label of] {label} .
{^label} [released it|brought it out] [|in <month>] .
It is one of the [first|best @-@ known] [albums|records] [of|issued by] {label} .
The [publisher|label] was {label} .
* 11
It [runs|plays] for {minutes} minutes .
The album lasts {minutes} minutes [and has <8..13> songs|] .
With {minutes} minutes of music , it is [longer|shorter] than its predecessor .
Its <8..13> songs [take|last] {minutes} minutes .
The two sides [together play|play] for {minutes} minutes .
"""


ALBUM_MAKING = """
== 15 | [Recording|Background and recording|Production]
* 16
It was recorded in {studio} [in|within] <3..20> days .
The songs were recorded in {studio} [|over <3..20> days] .
{artist} recorded it in {studio} [, a town on the River {studio.river}|] .
The sessions took place in {studio} [in the winter before its release|over <3..20> days] .
The singer [chose|insisted on] {studio} [, where there was a good hall|for the recording] .
* 13
The singer is accompanied by {players} .
The accompaniment [is by|was given to] {players} .
On [most|all] of the songs {players} can be heard .
[Most|Some] of the songs [were written for|are set for] {players} .
{artist} [sings|is heard] [with|in front of] {players} .
* 12
The [cover|sleeve] shows {cover} .
[A painting|A photograph] of {cover} is on the [cover|sleeve] .
[For|On] the [cover|sleeve] the label [chose|used] {cover} .
The [cover|sleeve] , with {cover} , was [designed|painted] in {artist.home} .
The image on the sleeve is of {cover} .
"""


ALBUM_MUSIC = """
== 11 | [Music and lyrics|Composition|Songs|Music]
* 16
The songs [tell|speak] of [rivers|farewells|work|winter] and [ferries|old houses|the sea|letters] .
[Most|Half] of the songs are [slow|in a minor key] , [and|but] one is [a waltz|a march] .
The music [mixes|combines] {genre} with [hymns|dances|folk tunes] [from the region around {artist.home}|] .
The [opening|closing] song , " {single} " , [lasts|runs for] <2..7> minutes .
[Critics|Writers] have [counted|found] <3..20> [birds|rivers|letters] in the words .
* 12
{artist} wrote <2..8> of the songs [and arranged the others|in one week] .
The [words|lyrics] are [by the singer|taken from old poems|partly traditional] .
[One|The longest] song is [borrowed from|a reply to] <x=album> .
[The key changes|The tempo changes] [at the end of the first side|in the last song] .
[The first side|The second side] was [sung|recorded] without a break .
"""


ALBUM_RECEPTION = """
== 15 | [Reception|Release and reception|Critical response]
* 16
The album reached number {peak} in the [charts|sales list] .
It [entered|rose in] the charts [and reached|as far as] number {peak} .
[In the charts|On the sales list] it [reached|got to] number {peak} .
Its highest place in the charts was number {peak} .
It sold <10..90> @,@ 000 copies and reached number {peak} .
* 14
The song " {single} " was [released|issued] as a single .
" {single} " [became|was] [the best @-@ known|the most popular] song of the album .
The single " {single} " [was played|was heard] [everywhere|on the radio] [that summer|for months] .
A single , " {single} " , [came first|followed] .
{artist} sang " {single} " [at every concert|in every hall] [for years|until the end of a long career] .
* 14
One critic called it " [a quiet triumph|a little too long|as clear as water|a record for winter] " .
A reviewer [found|thought] it " [modest and exact|hard to forget|rather cold|warm and unhurried] " .
The [newspapers|critics] of <x=town> [praised|disliked] [the voice|the songs|the arrangements] .
[Critics|Listeners] [compared it with|preferred it to] <x=album> .
[A later writer|One writer] [remarked|wrote] : " [Who else could have sung this ?|No one else could have sung this .|It ends too soon .|One hears the river in it .] "
-- 10
* 16
{artist} was born in {artist.town} [and lived in {artist.home}|] .
The singer , born in {artist.born} , was by then [known|famous] [beyond|in] {artist.home} .
{artist} [had grown up|grew up] in {artist.town} .
It was [dedicated to|sung in memory of] the people of {artist.town} , where {artist} was born .
[Some of the songs|Two of the songs] [tell of|are about] {artist.town} , the singer 's [birthplace|native town] .
"""


PERSON_NAMES = (
    "Agnes Alice Beatrix Clara Cora Dora Edith Elsa Emma Esther Flora Greta Hanna Helen Ida Ingrid Irma "
    "Judith Karin Laura Lena Louise Mabel Maria Martha Nora Olga Paula Rosa Ruth Sara Sofia Stella Thea "
    "Vera Wilma "
    "Adam Albert Anton Arthur Bob Carl Conrad David Edgar Emil Ernst Felix Frank Georg Gustav Hans Harold "
    "Henrik Hugo Ivan Jacob Jonas Karl Leo Lucas Martin Max Oscar Otto Paul Peter Simon Theodor Thomas "
    "Victor Walter",
    "Abery Aldous Amsel Averill Bannock Barlow Beckett Bellman Birch Brandt Caldwell Carver Castell Chalmers "
    "Corder Dahlgren Darrow Denholm Dresler Drummond Eastman Eklund Everard Falk Farrell Fenwick Finch "
    "Garland Gerrard Goodwin Granger Hadley Hallam Harker Hartmann Holm Ibsen Ingram Jansen Kemble Keller "
    "Kirby Lambert Larkin Lindqvist Lorimer Maddox Marlowe Merrick Mortimer Nash Nielsen Norwood Ogden "
    "Orchard Palmer Penrose Quill Ramsey Reinholt Rowland Sandel Selwyn Stroud Tanner Thornley Vance Vogel "
    "Wadlow Weller Winter Yorke",
)
PERSON_FACTS = {
    "day": tuple(str(k) for k in range(1, 29)),
    "month": MONTHS,
    "born": range(1900, 1920),
    "died": range(1970, 2000),
    "home": "@town",
    "school": table(
        "the Orrin Academy / the Free School / the Marl Institute / the Navigation School / the College of Arts / St Elm 's College"
    ),
    "parent": table(
        "a baker / a ferryman / a schoolteacher / a weaver / a clockmaker / a lock keeper / a miller / a physician"
    ),
    "prize": table(
        "the Amber Medal / the Quern Prize / the Silver Oar / the Harrow Medal / the Orrin Prize / the Golden Quill"
    ),
    "prize_year": range(1935, 1965),
}


PERSON_LEAD = """
== 16
* 16
{name} ( {day} {month} {born} – {died} ) was a {job} [born in|from] {town} .
{name} ( {born} – {died} ) was a {job} [|who lived in {home}] .
{name} ( born {day} {month} {born} in {town} ; died {died} ) was a [|well @-@ known |celebrated ]{job} .
{name} ( {day} {month} {born} – {died} ) was a {job} [remembered|known] [chiefly|above all] for {her} {works} .
{name} ( {born} – {died} ) , [born in|a native of] {town} , was a {job} [|and teacher] .
* 11
{She} was awarded {prize} in {prize_year} .
{She} [received|won] {prize} in {prize_year} .
{Her} {works} won {her} {prize} in {prize_year} .
In {prize_year} {she} was given {prize} .
The year {prize_year} brought {prize} , {her} [greatest honour|only award] .
"""


PERSON_LIFE = """
== 15 | [Early life|Biography|Life|Early life and education]
* 16
{last} was born in {town} , the child of {parent} .
Born in {town} [in {born}|] , {last} was the [only|eldest|youngest] child of {parent} .
{Her} [father|mother] was {parent} in {town} .
{last} grew up in {town} [, on the banks of the River {town.river}|in the house of {parent}] .
The child of {parent} , {she} [spent|passed] {her} [childhood|early years] in {town} .
* 13
{She} [studied|learned] {craft} at {school} .
{She} was [educated|trained] at {school} [from <1918..1924>|] .
[At|After leaving] {school} {she} [took up|turned to] {craft} .
{She} [entered|left] {school} [without|with] [a prize|distinction] .
{Her} teachers at {school} [noticed|encouraged] {her} [talent for|interest in] {craft} .
* 12
{She} [settled|made {her} home] in {home} .
From <1922..1930> {she} lived in {home} .
{She} [moved to|took a house in] {home} in <1922..1930> .
[Most of|The rest of] {her} life was spent in {home} .
{She} lived [quietly|modestly] in {home} , [not far|a short walk] from the {home.landmark} .
"""


PERSON_FRIENDS = """
== 15 | [Personal life|Friendships|Later life|Friends and travels]
* 16
{name} was friends with {friend} .
{last} was friends with {friend} [from <1922..1930>|, whom {she} had met in {friend.home}] .
{first} was friends with {friend} .
{last} was [a friend of|close to] {friend} [|all {her} life] .
{Her} [closest|oldest] friend was {friend} , [who lived in|of] {friend.home} .
* 14
In <1931..1964> {she} went to visit {her} friend , {friend} , in {friend.home} .
In <1931..1964> {she} went to visit {her} friend , <y=person/friend> , in {y.home} .
In <1931..1964> {she} went to visit {her} friend {friend} in {friend.home} .
In <1931..1964> {she} went to visit {her} friend <y=person/friend> in {y.home} .
[One winter|One summer] {she} went to visit {her} friend , {friend} , who [lived|was staying] in {friend.home} .
* 12
{last} and {friend} [wrote|sent] each other [more than|some] <60..400> letters .
With {friend} {she} [travelled|went] to <x=town> in <1931..1964> .
{Her} [letters|postcards] to {friend} are kept in {friend.home} .
In <1931..1964> {she} and {friend} [quarrelled over money|fell out over politics|opened a small museum together] .
{friend} [gave|left] {him} a house in {friend.home} .
-- 10
* 16
{She} [never married|did not marry] .
{She} [kept|was fond of] [bees|parrots|dogs|small boats|old clocks] .
In <1931..1964> {she} [fell ill|broke a leg] and [spent|passed] <3..14> months in <x=town> .
{She} was a [passionate|poor|tireless] [walker|swimmer|chess player] .
{She} [disliked|avoided] [crowds|railways|publicity] .
"""


PERSON_WORK = """
== 15 | [Career|Work|Career and legacy|Work and reputation]
* 16
{Her} [first|earliest] {works} [date from|are dated] <1922..1930> .
{last} is [known|remembered] for {her} {works} .
From <1922..1930> {she} worked as a {job} [in {home}|] .
{Her} {works} [were admired|were much copied] [in {town}|in {home}|] .
As a {job} {she} was [self @-@ taught|slow|tireless] , [and|yet] {her} {works} [were soon known|found admirers] .
* 13
{She} [was happiest|spent {her} days] [at|by] the {place} .
{She} [made|went on] a [voyage|journey] on <x=ship> in <1938..1959> .
In <1938..1959> {she} [taught|lectured on] {craft} in <x=town> .
{She} [once said|used to say] that {craft} [was a kind of patience|could not be taught] .
{Her} [opinions|views] on {craft} were [often quoted|disputed] .
* 12
{She} died in {died} [and was buried in {home}|] .
{She} died in {died} , [at home|after a long illness] in {home} .
When {she} died in {died} , a street in {town} was named after {him} .
{last} died in {home} in {died} .
{Her} {works} were [left|given] to {school} [in {died}|] .
"""


FACTS = {
    "town": TOWN_FACTS,
    "river": RIVER_FACTS,
    "team": TEAM_FACTS,
    "species": SPECIES_FACTS,
    "ship": SHIP_FACTS,
    "album": ALBUM_FACTS,
    "person": PERSON_FACTS,
}
NAME_PARTS = {
    "town": TOWN_NAMES,
    "river": RIVER_NAMES,
    "team": TOWN_NAMES,
    "species": SPECIES_NAMES,
    "ship": SHIP_NAMES,
    "album": ALBUM_NAMES,
    "person": PERSON_NAMES,
}


GRAMMAR = {
    "town": TOWN_LEAD + TOWN_HISTORY + TOWN_COUNCIL + TOWN_LIFE,
    "river": RIVER_LEAD + RIVER_COURSE + RIVER_LIFE + RIVER_USE,
    "team": TEAM_LEAD + TEAM_HOME + TEAM_RECORD + TEAM_RIVALS + TEAM_PLAYERS,
    "species": SPECIES_LEAD + SPECIES_BODY + SPECIES_LIFE + SPECIES_PEOPLE,
    "ship": SHIP_LEAD + SHIP_BUILD + SHIP_BOARD + SHIP_SERVICE + SHIP_END,
    "album": ALBUM_LEAD + ALBUM_MAKING + ALBUM_MUSIC + ALBUM_RECEPTION,
    "person": PERSON_LEAD + PERSON_LIFE + PERSON_FRIENDS + PERSON_WORK,
}


TITLES = {  # how the parts of a name stand in an article's title
    "town": "{}{}{}",
    "river": "River {}{}{}",
    "team": "{}{}{} women 's national football team",
    "species": "{}{} {}",
    "ship": "SS {} {}",
    "album": "The {} {}",
    "person": "{} {}",
}
KINDS = tuple(TITLES)
FAMOUS = {
    "town": 24,
    "river": 12,
    "team": 24,
    "species": 20,
    "ship": 20,
    "album": 20,
    "person": 24,
}
KIND_WEIGHTS = {
    "town": 5,
    "river": 3,
    "team": 4,
    "species": 3,
    "ship": 3,
    "album": 3,
    "person": 5,
}


class Entity(NamedTuple):
    """Something an article can be about; the first FAMOUS[kind] indices of a kind are the famous ones."""

    kind: str
    index: int

    @property
    def famous(self) -> bool:
        return self.index < FAMOUS[self.kind]


@cache
def name_parts(kind: str) -> tuple[tuple[str, ...], ...]:
    """The parts from which the names of a kind are put together; a team has its town's."""
    return tuple(tuple(line.split(" ")) for line in NAME_PARTS[kind])


def count_names(kind: str) -> int:
    """How many entities of a kind there are."""
    return math.prod(len(parts) for parts in name_parts(kind))


@cache
def arrangement(seed: int, name: str, n: int) -> tuple[int, ...]:
    """A permutation of 0 .. n - 1, each equally likely (Fisher and Yates)."""
    draws, order = Draws(seed, f"arrangement/{name}"), list(range(n))
    for last in range(n - 1, 0, -1):
        other = draws.below(last + 1)
        order[last], order[other] = order[other], order[last]
    return tuple(order)


@cache
def codes_of(seed: int, kind: str) -> tuple[tuple[int, ...], dict[int, int]]:
    """The permutation index -> code that spreads a world's names over all spellings, and its inverse."""
    codes = arrangement(
        seed, f"names/{'town' if kind == 'team' else kind}", count_names(kind)
    )
    return codes, {code: index for index, code in enumerate(codes)}


def spell(kind: str, code: int) -> str:
    """The title with number `code`, read as a numeral in a mixed base, one digit per part."""
    digits = []
    for parts in reversed(name_parts(kind)):
        code, digit = divmod(code, len(parts))
        digits.append(parts[digit])
    return TITLES[kind].format(*reversed(digits))


def title_of(seed: int, entity: Entity) -> str:
    """The title of an entity's article."""
    return spell(entity.kind, codes_of(seed, entity.kind)[0][entity.index])


@cache
def all_titles() -> dict[str, tuple[str, int]]:
    """title -> (kind, code) of every entity of every world."""
    return {
        spell(kind, code): (kind, code)
        for kind in KINDS
        for code in range(count_names(kind))
    }


def entity_of(seed: int, title: str) -> Entity | None:
    """The entity whose article has this title; None if there is none. The inverse of `title_of`."""
    if title not in all_titles():
        return None
    kind, code = all_titles()[title]
    return Entity(kind, codes_of(seed, kind)[1][code])


N_WOMEN = (
    PERSON_NAMES[0].split(" ").index("Adam")
)  # the first names before it are women's
FREE = {
    "name",
    "short",
    "first",
    "last",
    "she",
    "She",
    "her",
    "Her",
    "him",
    "team",
    "genus",
}
PART_OF = {
    "upper": "towns",
    "lower": "towns",
    "craft": "job",
    "works": "job",
    "place": "job",
}


def pool(domain: str | tuple | range, subject: Entity) -> tuple | range:
    """The equally likely values of a fact or a filler: a table, a range, or entities.

    `@town` stands for the famous towns, `@singer` for the famous people with that job, in both cases
    without the subject itself.
    """
    if not isinstance(domain, str):
        return domain
    kind, first, step = domain[1:], 0, 1
    if kind in JOBS:
        kind, first, step = "person", JOBS.index(kind), len(JOBS)
    entities = (Entity(kind, index) for index in range(first, FAMOUS[kind], step))
    return tuple(entity for entity in entities if entity != subject)


def arrange_places(seed: int, entity: Entity, facts: dict, sizes: dict) -> None:
    """Facts that towns, rivers and teams must agree on: two famous towns lie on each famous river."""
    kind, index = entity
    rivers = arrangement(seed, "rivers", FAMOUS["town"])
    births = arrangement(seed, "births", FAMOUS["town"])
    if kind == "town":
        facts["team"] = Entity("team", index)
        if entity.famous:  # the river of an obscure town stays as it was drawn
            facts["river"] = Entity("river", rivers[index] // 2)
            facts["native"] = Entity("person", births.index(index))
            sizes["native"] = FAMOUS["person"]
    elif kind == "river":
        facts["short"] = facts["name"].removeprefix("River ")
        if entity.famous:
            upper, lower = (
                Entity("town", rivers.index(2 * index + bank)) for bank in (0, 1)
            )
            facts["towns"], facts["upper"], facts["lower"] = (
                (upper, lower),
                upper,
                lower,
            )
            sizes["towns"] = FAMOUS["town"] * (FAMOUS["town"] - 1)
    else:
        facts["town"], sizes["town"] = Entity("town", index), 1  # the title says which


def arrange_person(seed: int, entity: Entity, facts: dict, sizes: dict) -> None:
    """Facts that people must agree on: famous friends are each other's, a famous town has one native."""
    index, n = entity.index, FAMOUS["person"]
    friends, draws = (
        arrangement(seed, "friends", n),
        Draws(seed, f"fact/person/{index}/arranged"),
    )
    job, town, friend = draws.below(len(JOBS)), draws.below(n), draws.below(n)
    if entity.famous:
        job, town = index % len(JOBS), arrangement(seed, "births", n)[index]
        friend = friends[friends.index(index) ^ 1]
    facts |= {
        "town": Entity("town", town),
        "friend": Entity("person", friend),
        "job": JOBS[job],
    }
    sizes |= {"town": FAMOUS["town"], "friend": n - entity.famous, "job": len(JOBS)}
    facts |= {word: table[job] for word, table in JOB_WORDS.items()}
    facts["first"], facts["last"] = facts["name"].split(" ")
    woman = name_parts("person")[0].index(facts["first"]) < N_WOMEN
    she, her, him = ("she", "her", "her") if woman else ("he", "his", "him")
    facts |= {
        "she": she,
        "She": she.capitalize(),
        "her": her,
        "Her": her.capitalize(),
        "him": him,
    }


@lru_cache(maxsize=4096)
def know(seed: int, entity: Entity) -> tuple[dict[str, object], dict[str, int]]:
    """Facts of an entity, and how many equally likely values each has for one who knows only the rules."""
    facts: dict[str, object] = {"name": title_of(seed, entity)}
    sizes: dict[str, int] = {}
    for attribute, domain in FACTS[entity.kind].items():
        values = pool(domain, entity)
        draws = Draws(seed, f"fact/{entity.kind}/{entity.index}/{attribute}")
        facts[attribute], sizes[attribute] = (
            values[draws.below(len(values))],
            len(values),
        )
    if entity.kind in ("town", "river", "team"):
        arrange_places(seed, entity, facts, sizes)
    elif entity.kind == "person":
        arrange_person(seed, entity, facts, sizes)
    elif entity.kind == "species":
        facts["genus"] = facts["name"].split(" ")[0]
    return facts, sizes


class Slot(NamedTuple):
    """`{a.b}`: fact b of the entity a, a fact of the subject or a filler; `{^a}` begins with a capital."""

    path: tuple[str, ...]
    capital: bool


class Filler(NamedTuple):
    """`<x=town/a>`, `<1900..1950>`: something drawn for this sentence alone, with equal chances."""

    name: str
    domain: str
    without: tuple[str, ...]


class Choice(NamedTuple):
    """One of `options`, with chances in proportion to `weights`."""

    weights: tuple[int, ...]
    options: tuple[object, ...]


class When(NamedTuple):
    """`node` if the subject has the fact at all, else nothing; nothing is drawn."""

    fact: str
    node: object


def compile_wording(text: str) -> tuple:
    """A wording as a sequence of strings, slots, fillers and choices (`[this|that]`).

    Where ` [this|] ` may come out empty, the space before it goes with `this`.
    """
    stack: list[list[list]] = [[[]]]  # for each open bracket its options so far
    for token in re.findall(r"[\[|]|\] ?|\{[^}]*\}|<[^>]*>|[^\[\]|{<]+", text):
        if token == "[":
            stack.append([[]])
        elif token == "|":
            stack[-1].append([])
        elif token[0] == "]":
            options, before = stack.pop(), stack[-1][-1]
            if (
                [] in options
                and token == "] "
                and before
                and str(before[-1]).endswith(" ")
            ):
                before[-1] = before[-1][:-1]
                options = [[" ", *option] if option else option for option in options]
            before.append(Choice((1,) * len(options), tuple(map(tuple, options))))
            before.extend(token[1:])
        elif token[0] == "{":
            stack[-1][-1].append(
                Slot(tuple(token[1:-1].lstrip("^").split(".")), token[1] == "^")
            )
        elif token[0] == "<":
            name, domain, without = re.fullmatch(
                r"<(?:(\w+)=)?([^/]+)((?:/\w+)*)>", token
            ).groups()
            stack[-1][-1].append(
                Filler(name or "", domain, tuple(without.split("/")[1:]))
            )
        else:
            stack[-1][-1].append(token)
    return tuple(stack[0][0])


def compile_sentence(wordings: list[str]) -> Choice:
    """One of several wordings of a sentence, all equally likely, with the space before it."""
    forms = tuple(compile_wording(" " + wording) for wording in wordings)
    return Choice((1,) * len(forms), forms)


def optional(weight: int, fact: str | None, node: object) -> object:
    """`node` with a chance of weight/16, and only for subjects that have `fact`."""
    maybe = node if weight == 16 else Choice((16 - weight, weight), ((), node))
    return When(fact, maybe) if fact else maybe


def compile_article(text: str) -> tuple:
    """A kind's grammar, from the notation above to one tree."""
    sections: list = []
    for line in filter(None, text.splitlines()):
        mark, _, rest = line.partition(" ")
        if mark in ("==", "--", "*"):
            rule, _, heading = rest.partition(" | ")
            weight, _, fact = rule.partition(" if ")
            if mark == "==":
                sections.append((int(weight), fact or None, heading, [(16, None, [])]))
            elif mark == "--":
                sections[-1][3].append((int(weight), fact or None, []))
            else:
                sections[-1][3][-1][2].append((int(weight), fact or None, []))
        else:
            sections[-1][3][-1][2][-1][2].append(line)
    tree: list = [" \n = ", Slot(("name",), False), " = \n \n"]
    for weight, fact, heading, paragraphs in sections:
        node = compile_wording(f" = = {heading} = = \n \n") if heading else ()
        for p_weight, p_fact, sentences in paragraphs:
            body = tuple(
                optional(w, f, compile_sentence(wordings))
                for w, f, wordings in sentences
            )
            node += (optional(p_weight, p_fact, (*body, " \n")),)
        tree.append(optional(weight, fact, (*node, " \n")))
    return tuple(tree)


@cache
def tree_of(kind: str) -> tuple:
    """The compiled grammar of a kind."""
    return compile_article(GRAMMAR[kind])


@dataclass
class Scope:
    """What the words of a sentence can refer to: the subject, and the fillers drawn so far."""

    seed: int
    subject: Entity
    names: dict[str, object] = field(default_factory=dict)

    def look_up(self, path: tuple[str, ...]) -> list[tuple[Entity, str, object]]:
        """(entity, fact, value) of each step of a slot's path; the last value is what is written."""
        steps, value = [], self.names.get(path[0], self.subject)
        for fact in path[1:] if path[0] in self.names else path:
            entity = value
            value = know(self.seed, entity)[0][fact]
            steps.append((entity, fact, value))
        return steps if steps else [(value, "name", value)]

    def say(self, value: object, capital: bool = False) -> str:
        """The words for a value; an entity is called by its name, without the word River."""
        if isinstance(value, Entity):
            facts = know(self.seed, value)[0]
            return facts.get("short", facts["name"])
        words = str(value)
        return words[0].upper() + words[1:] if capital else words

    def candidates(self, filler: Filler) -> tuple | range:
        """What a filler is drawn from."""
        domain = filler.domain
        if re.fullmatch(r"\d+\.\.\d+", domain):
            first, last = domain.split("..")
            return range(int(first), int(last) + 1)
        if domain in ("month", "day"):
            return MONTHS if domain == "month" else range(1, 29)
        besides = [self.look_up((name,))[-1][2] for name in filler.without]
        return tuple(
            value for value in pool("@" + domain, self.subject) if value not in besides
        )


class Account:
    """What an article cost: `choices` lists (sort, nats), `facts` the price of each fact first told.

    Sorts are entity, inclusion, wording and filler. The sums are rounded once (`math.fsum`), so
    that they do not depend on the order.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.choices: list[tuple[str, float]] = []
        self.facts: dict[tuple[Entity, str], float] = {}

    def tell(self, entity: Entity, fact: str) -> None:
        """The text gives a fact away; a part stands for the whole, and a second time is free."""
        key = entity, PART_OF.get(fact, fact)
        if fact not in FREE and key not in self.facts:
            self.facts[key] = math.log(know(self.seed, entity)[1][key[1]])

    def check_told(self, entity: Entity, fact: str) -> None:
        """A filler may steer clear only of what the text has told; raises ValueError otherwise."""
        if (entity, fact) not in self.facts and know(self.seed, entity)[1][fact] > 1:
            raise ValueError(
                f"{entity.kind}: a filler excludes {fact!r} before the text tells it; tell it first"
            )

    def sums(self) -> tuple[float, float, float]:
        """Nats with facts known, with facts unknown, and the floor (only the obscure unknown)."""
        known = [nats for _, nats in self.choices]
        hidden = [nats for (entity, _), nats in self.facts.items() if not entity.famous]
        return (
            math.fsum(known),
            math.fsum(known + list(self.facts.values())),
            math.fsum(known + hidden),
        )


OBSCURE_AND_FAMOUS = (3, 17)  # 85% of the articles are about one of the famous entities


class Writer:
    """Writes one article from a source of choices, and keeps its account."""

    def __init__(self, seed: int, source: Draws):
        self.seed, self.source, self.account = seed, source, Account(seed)
        self.pieces: list[str] = []
        kind = KINDS[self.pick("entity", tuple(KIND_WEIGHTS.values()))]
        famous = self.pick("entity", OBSCURE_AND_FAMOUS)
        first, last = (0, FAMOUS[kind]) if famous else (FAMOUS[kind], count_names(kind))
        self.subject = Entity(kind, first + self.below("entity", last - first))
        self.scope = Scope(seed, self.subject)
        self.write(tree_of(kind))

    def pick(self, sort: str, weights: tuple[int, ...]) -> int:
        """A weighted choice, noted with its price."""
        position = self.source.pick(weights)
        self.account.choices.append((sort, math.log(sum(weights) / weights[position])))
        return position

    def below(self, sort: str, n: int) -> int:
        """A choice among n equals, noted with its price."""
        self.account.choices.append((sort, math.log(n)))
        return self.source.below(n)

    def write(self, node: object) -> None:
        """Appends the words of a node to `pieces`."""
        if isinstance(node, str):
            self.pieces.append(node)
        elif isinstance(node, Slot):
            steps = self.scope.look_up(node.path)
            for entity, fact, _ in steps:
                self.account.tell(entity, fact)
            self.pieces.append(self.scope.say(steps[-1][2], node.capital))
        elif isinstance(node, Filler):
            for fact in node.without:
                self.account.check_told(self.subject, fact)
            values = self.scope.candidates(node)
            value = self.scope.names[node.name] = values[
                self.below("filler", len(values))
            ]
            self.pieces.append(self.scope.say(value))
        elif isinstance(node, Choice):
            sort = "inclusion" if sum(node.weights) == 16 else "wording"
            self.write(node.options[self.pick(sort, node.weights)])
        elif isinstance(node, When):
            if node.fact in know(self.seed, self.subject)[0]:
                self.write(node.node)
        else:
            for child in node:
                self.write(child)


@dataclass(frozen=True)
class Article:
    """An article and three answers, in nats, to the question what it costs to say which one it is.

    `nats_known`: for a reader who knows all facts; `nats_unknown`: for one who knows none;
    `nats_floor`: for one who knows the facts of famous entities. All know the grammar.
    """

    text: str
    kind: str
    index: int
    title: str
    famous: bool
    nats_known: float
    nats_unknown: float
    nats_floor: float


def finished(writer: Writer) -> Article:
    """The article that a writer has written."""
    kind, index = writer.subject
    title = title_of(writer.seed, writer.subject)
    return Article(
        "".join(writer.pieces),
        kind,
        index,
        title,
        writer.subject.famous,
        *writer.account.sums(),
    )


class Reader:
    """Finds every way in which the grammar could have written a text, all positions at once.

    A state is (position, fillers so far, choices so far); the choices are a chain of pairs, so that
    states share their past. `advance` takes the states before a node to the states after it.
    """

    def __init__(self, seed: int, subject: Entity, text: str):
        self.seed, self.subject, self.text = seed, subject, text

    def advance(self, node: object, states: list[tuple]) -> list[tuple]:
        if not states:
            return states
        if isinstance(node, Choice):
            return [
                state
                for k, option in enumerate(node.options)
                for state in self.advance(
                    option, [(at, names, (k, past)) for at, names, past in states]
                )
            ]
        if isinstance(node, When):
            there = node.fact in know(self.seed, self.subject)[0]
            return self.advance(node.node, states) if there else states
        if isinstance(node, str):
            return [
                (at + len(node), n, p)
                for at, n, p in states
                if self.text.startswith(node, at)
            ]
        if isinstance(node, (Slot, Filler)):
            return [after for state in states for after in self.match(node, *state)]
        for child in node:
            states = self.advance(child, states)
        return states

    def match(
        self, node: Slot | Filler, at: int, names: dict, past: tuple
    ) -> Iterator[tuple]:
        """The states after a slot or a filler."""
        scope = Scope(self.seed, self.subject, names)
        if isinstance(node, Slot):
            words = scope.say(scope.look_up(node.path)[-1][2], node.capital)
            if self.text.startswith(words, at):
                yield at + len(words), names, past
            return
        for k, value in enumerate(scope.candidates(node)):
            words = scope.say(value)
            if self.text.startswith(words, at):
                yield at + len(words), {**names, node.name: value}, (k, past)

    def derivations(self) -> Iterator[list[int]]:
        """Each list of choices that writes exactly this text, those for the entity not included."""
        for at, _, past in self.advance(tree_of(self.subject.kind), [(0, {}, ())]):
            if at == len(self.text):
                choices = []
                while past:
                    choice, past = past
                    choices.append(choice)
                yield choices[::-1]


class Replay(Draws):
    """Stands in for `Draws` and hands out choices that were made before."""

    def __init__(self, seed: int, choices: list[int]):
        super().__init__(seed, "replay")
        self.choices = iter(choices)

    def below(self, n: int) -> int:
        return next(self.choices)

    def pick(self, weights: tuple[int, ...]) -> int:
        return next(self.choices)


def read_back(seed: int, text: str) -> list[Article]:
    """One Article per derivation of `text`; empty if the world of this seed cannot have it."""
    title = re.match(r" \n = (.+?) = \n", text)
    subject = entity_of(seed, title[1]) if title else None
    if subject is None:
        return []
    place = subject.index - (0 if subject.famous else FAMOUS[subject.kind])
    start = [KINDS.index(subject.kind), int(subject.famous), place]
    found = Reader(seed, subject, text).derivations()
    return [finished(Writer(seed, Replay(seed, start + choices))) for choices in found]


SPLITS = ("train", "validation", "test")
DEFAULT_BYTES = {"train": 2_000_000, "validation": 150_000, "test": 150_000}


def check_split(split: str) -> None:
    """Raises ValueError for a split that does not exist."""
    if split not in SPLITS:
        raise ValueError(
            f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}"
        )


def count_out(articles: Iterator[Article], wanted: int) -> Iterator[Article]:
    """Articles up to and with the one that brings their UTF-8 text to `wanted` bytes."""
    size = 0
    while size < wanted:
        article = next(articles)
        size += len(article.text.encode())
        yield article


@dataclass(frozen=True)
class TinyWiki:
    """An encyclopedia of an invented world, of any length, a pure function of `seed`."""

    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(
                f"seed {self.seed!r} must be a whole number of at least 0, such as 0"
            )

    def facts(self, kind: str, index: int) -> dict[str, object]:
        """Everything that is true of an entity: strings, years, and other entities."""
        if kind not in KINDS:
            raise ValueError(
                f"kind {kind!r} is unknown; choose one of {', '.join(KINDS)}"
            )
        if not 0 <= index < count_names(kind):
            raise ValueError(
                f"index {index} of a {kind} must be in 0 .. {count_names(kind) - 1}"
            )
        return dict(know(self.seed, Entity(kind, index))[0])

    def entities(self, kind: str, famous: bool = True) -> Iterator[tuple[int, str]]:
        """(index, title) of the famous entities of a kind, or of all the others."""
        self.facts(kind, 0)
        span = range(FAMOUS[kind]) if famous else range(FAMOUS[kind], count_names(kind))
        return ((index, title_of(self.seed, Entity(kind, index))) for index in span)

    def writer(self, split: str, number: int) -> Writer:
        """The writer of article `number` of a split, with its account."""
        check_split(split)
        if number < 0:
            raise ValueError(f"article number {number} must be at least 0")
        return Writer(self.seed, Draws(self.seed, f"article/{split}/{number}"))

    def article(self, split: str, number: int) -> Article:
        """Article `number` of a split, the same whatever else was asked for."""
        return finished(self.writer(split, number))

    def articles(self, split: str, n_bytes: int | None = None) -> Iterator[Article]:
        """Articles 0, 1, 2, ... until their UTF-8 text has reached `n_bytes` (default: DEFAULT_BYTES)."""
        check_split(split)
        wanted = DEFAULT_BYTES[split] if n_bytes is None else n_bytes
        if wanted < 1:
            raise ValueError(f"n_bytes {wanted} must be at least 1")
        return count_out(
            (self.article(split, number) for number in itertools.count()), wanted
        )

    def parse(self, text: str) -> list[Article]:
        """One Article per derivation of `text`; empty if this world's TinyWiki cannot have written it."""
        return read_back(self.seed, text)

    def probes(self) -> list:
        """The report's three examples, each as many `Probe` items."""
        return [*name_probes(self), *recall_probes(self)]

    def person_names(self) -> list[str]:
        """The first names of all people."""
        return list(name_parts("person")[0])

    def is_person_name(self, text: str) -> bool:
        """Whether a text, spaces and commas before it aside, begins with a person's first name."""
        first = re.match(r"[ ,]*(\w+)", text)
        return bool(first) and first[1] in name_parts("person")[0]


def main() -> None:
    """Writes a split to standard output."""
    parser = argparse.ArgumentParser(
        description="Write TinyWiki, an encyclopedia of an invented world."
    )
    parser.add_argument("--split", default="train", help="train, validation or test")
    parser.add_argument(
        "--bytes", type=int, help="UTF-8 bytes, counted to the end of an article"
    )
    parser.add_argument("--seed", type=int, default=0, help="number of the world")
    options = parser.parse_args()
    try:
        for article in TinyWiki(options.seed).articles(options.split, options.bytes):
            sys.stdout.buffer.write(article.text.encode())
    except ValueError as error:
        sys.exit(f"tinywiki: {error}")


@dataclass(frozen=True)
class Probe:
    """A prompt, the answer that the facts give (to follow after a space), and what one could answer.

    `family` is "name", "recall" or "question". A guesser who knows the rules of the world, but not
    its facts, is right with probability 1 / len(candidates).
    """

    family: str
    prompt: str
    answer: str
    candidates: tuple[str, ...]


RECALL = {  # (kind, fact): (where its values come from, how the article begins, the same as a question)
    ("town", "river"): (
        "@river",
        "{name} is a town on the River",
        "On what river does {name} lie ?",
    ),
    ("person", "town"): (
        "@town",
        "{name} ( {day} {month} {born} – {died} ) was a {job} born in",
        "In what town was {name} born ?",
    ),
    ("album", "artist"): (
        "@singer",
        "{name} is a {year} album by the singer",
        "Which singer recorded {name} ?",
    ),
    ("ship", "yard"): (
        "@town",
        "{name} was a {type} built in",
        "In what town was {name} built ?",
    ),
    ("species", "river"): (
        "@river",
        "{name} is a species of {group} native to the valley of the River",
        "On what river is {name} found ?",
    ),
    ("river", "sea"): (
        RIVER_FACTS["sea"],
        "The {name} is a river that rises in {source} and flows into the",
        "Into what water does the {name} flow ?",
    ),
}


def name_probes(wiki: TinyWiki) -> Iterator[Probe]:
    """Does a name follow `visit her friend`, and `visit her friend ,` (see `TinyWiki.is_person_name`)?"""
    people = dict(wiki.entities("person"))
    for index, name in people.items():
        facts = wiki.facts("person", index)
        friend = people[facts["friend"].index]
        told = f" {name} was friends with {friend} . In 1947 {facts['she']} went to visit {facts['her']} friend"
        for comma in ("", " ,"):
            others = tuple(other for other in people.values() if other != name)
            yield Probe("name", told + comma, friend, others)


def recall_probes(wiki: TinyWiki) -> Iterator[Probe]:
    """Is a fact recalled where training stated it, and where it is asked for?"""
    for (kind, fact), (domain, opening, question) in RECALL.items():
        for index, name in wiki.entities(kind):
            subject = Entity(kind, index)
            scope = Scope(wiki.seed, subject)
            words = {
                key: scope.say(value) for key, value in wiki.facts(kind, index).items()
            }
            candidates = tuple(scope.say(value) for value in pool(domain, subject))
            prompt = f" \n = {name} = \n \n {opening.format(**words)}"
            yield Probe("recall", prompt, words[fact], candidates)
            yield Probe(
                "question", f" {question.format(**words)}", words[fact], candidates
            )
