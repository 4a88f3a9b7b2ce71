"""Common English verbs and nouns, chosen by the project. Their inflected forms come from packages, not from here."""

# ruff: noqa: SIM905 - a list literal of 700 words would hide them between quotes and commas

VERBS = """
accept add admire admit advise agree allow answer appear argue arrive arise ask attack avoid awake bake bathe be beat
become beg begin behave believe belong bend bet bind bite blame bleed blink blow boil borrow bounce bow breathe break
breed bring build burst buy call care carry catch cause change charge chase cheat check choose claim clap clean clear
climb cling close collect come compare complain complete confuse consider contain continue control cook copy correct
cost count cover crash crawl create creep cross cry cut dance dare deal decide decorate delay deliver deny depend
describe deserve destroy develop die dig disagree discover divide do doubt draw dress drink drive drop dry eat earn
employ empty enjoy enter escape examine excite exist expand expect explain fail fall fear feed feel fetch fight file
fill find fix flee float flood flow fly fold follow forbid force forget forgive form freeze fry gather get give glow
go greet grind grow guess guide hang happen hate have hear heat help hide hit hold hope hug hunt hurry hurt identify
imagine improve increase influence inform invent invite join joke judge jump keep kick kill kiss knock know land last
laugh lay lead leave lend let lift like listen live lock look lose love make manage march mark marry match matter mean
measure meet melt mend miss mix move multiply name need notice obey object observe occur offer open order own paint
park pass pay permit pick place plan plant play point polish pour practise pray prefer prepare press pretend prevent
print promise protect provide pull punish push put reach read realize receive recognize record reduce refuse regret
reject relax rely remain remember remove repair repeat replace reply report rescue rest return ride ring rise risk rob
roll rub ruin rule run rush sail save say scare scream search see seek seem sell send serve set shake share shave
shine shoot shout show shrink shut sigh sing sink sit sleep slide slip smell smile sneeze snow solve sound spare speak
spell spend spill spin split spoil spread spring stand stare start stay steal step stick sting stir stop store strike
study succeed suffer suggest supply support suppose surprise surround swear sweep swell swim swing take talk taste
teach tear tease tell tempt thank think throw tie touch tour train travel treat tremble trip trust try turn type
understand unite use vanish visit wait wake walk wander want warn wash waste watch wave wear weep weigh whisper win
wind wipe wish wonder work worry wrap wreck write yawn yell
""".split()

NOUNS = """
actor address afternoon airport analysis angel animal answer ant apple army arrow artist aunt baby bag ball banana
bank basis basket bath battery beach bean bear beard bed bee bell bench berry bicycle bird birthday body bone book
boot bottle box boy branch bridge brother brush bucket bus bush butterfly button cactus cake calf camera candle car
card carrot castle cat century chair cherry chief child church circus city class cliff clock cloud coach coat copy
corner country county cousin cow crisis crown cup curtain daisy dancer daughter day deer desk diary dictionary dish
doctor dog donkey door dove dress driver drum duck duty eagle ear echo egg elephant elf enemy engine essay eye fact
factory fairy family farmer father feather fence ferry field finger fish flag flower fly foot forest fork fox friend
frog fruit funeral game garden gas ghost giant gift girl glass goat goose grape grass guard guest guitar half hammer
hand hat head heart hero hill hobby hook horse hotel house hypothesis idea injury inch island jar jelly journey judge
jury key king kiss kitchen kite knee knife lady lake lamp language leaf leg lemon lesson letter library life lily line
lion lip list loaf lock lorry louse lunch machine man map mango market mask match meal medal melody memory mess
message mile mirror mistake money monkey monster month moon mosquito mother mountain mouse mouth museum nail name
nation neck nerve nest night nose number nurse oasis oath ocean office orange orchid owl ox oyster page paint parent
party path peach pear pen penny person photo piano picture piece pig pirate place planet plate pocket poem pony potato
prince prize problem puppy purse puzzle queen question quiz rabbit radio reef reply rhino ring river road robot rock
roof room rose school scarf scientist sea seat secret shadow sheep shelf ship shirt shoe shop sister sky snake soldier
son song soup spider spoon spy stadium star station step stitch stomach stone story stranger street strawberry student
studio sweater switch table tail task tax teacher team theory thesis thief throne ticket tiger toe tomato tooth torch
tower town toy tractor tree trick trout tune turkey uncle university valley veto victory video village violin virus
visitor voice volcano wagon waitress walrus wasp watch wave way week whale wheel whisper wife window wing winner wish
witch wizard wolf woman word worker world worm wound year zebra
""".split()
