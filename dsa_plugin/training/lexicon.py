"""The words that facts are made of. Each is one token of our tokenizer, with its leading space."""

import zlib


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    amber ancient azure bitter black blue brass bright broken bronze brown carved cedar cheap
    clean copper coral cracked crimson curved dark dusty empty faded fine flat frozen gilded
    glass golden gray green heavy hidden hollow iron ivory jade large leather light little
    long marble narrow oak old orange painted pale plain polished purple red rough round royal
    rusty scarlet silver small smooth square steel stone striped tall thin velvet violet warm
    white wide wooden woven yellow
    """
)
NOUNS = _words(
    """
    anchor apron arrow barrel basin basket bell belt blanket bottle bowl box bridge broom
    brush bucket cabin candle carpet cart chain chair chest clock coat coin compass crown cup
    curtain desk door drum fan feather fence flag flute gate glove hammer harp hat helmet jar
    kettle key kite knife ladder lamp lantern map mirror mug needle oven pearl pillow pipe
    plate pot purse ribbon ring rope saddle scarf shield shirt spoon stool table tower trunk
    vase wagon wheel whistle
    """
)
NAMES = _words(
    """
    Ada Agnes Albert Alma Amos Anna Arthur Basil Bella Boris Carl Cecil Clara Cora Daniel
    David Dora Edgar Edith Edwin Elsa Emil Emma Ernest Esther Ethel Eva Felix Flora Frank Fred
    George Gilda Grace Greta Harold Hattie Helen Henry Herman Hilda Hugo Ida Ines Irene Iris
    Isaac Ivan Jack James Jane Jonas Joseph Judith Julia Karl Kate Laura Leo Lewis Lydia Mabel
    Martin Mary Max Mina Nathan Nora Olga Oscar Otto Paul Peter Ralph Robert Rosa Ruth Samuel
    Sarah Simon Stella Susan Thomas Ursula Vera Victor Walter Wilma
    """
)
PLACES = _words(
    """
    Aleppo Athens Berlin Boston Bristol Cairo Calais Cork Cracow Delhi Denver Dover Dublin
    Exeter Geneva Genoa Ghent Hanoi Havana Hull Kyoto Lagos Leeds Lima Lisbon London Lyon
    Madrid Malta Milan Moscow Munich Naples Nice Oslo Oxford Paris Perth Porto Prague Quebec
    Riga Rome Rouen Seville Sofia Sydney Tokyo Tunis Turin Venice Vienna Warsaw York Zagreb
    Zurich
    """
)
# Few, so that notes share words and even pairs of them and differ by their order.
NOTE_WORDS = _words(
    """
    apple autumn bread cloud corn dew field fire fish forest frost garden grass hill honey
    horse island lake leaf meadow milk moon morning night ocean rain river salt sand snow star
    storm summer sun thunder valley water wheat wind winter
    """
)


def held_out_key(adjective: str, noun: str) -> bool:
    """Whether this pair is one of the eighth that training documents never hold."""
    return zlib.crc32(f"{adjective} {noun}".encode()) % 8 == 0
