"""Word lists of the official caption tokenizer, as its answers show them; `ptb_rules` makes rules of them.

Upper and lower case are alike unless a name says otherwise.
"""

KEEPS_DOT = """
    adj adm adv alex assoc asst atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec ens ft gen
    gov govs hon insp invt jos lieut lt maj messrs mlle mme mr mrs ms msgr mt natl pfc ph pres prof profs pvt rep
    reps rev sen sens sfc sgt spc st ste supt supts treas vs wm
""".split()
"""Titles and the like: the dot belongs to the word wherever it stands."""

MAY_END_SENTENCE = """
    al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq est etc ext feb
    fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla penn
    plc rd rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo
""".split()
"""As above, but before a capital (or a tag) the dot also ends the sentence."""

MAY_END_SENTENCE_CAPITAL = "ark az del ill la mass miss ore pa tex wash".split()
"""As above where the first letter is a capital: "Ore. coast", but "ore. mine"."""

DOT_BEFORE_NUMBER = "art ca fig figs no nos op p pp prop".split()
"""The dot belongs to the word only before a digit: "no. 5"."""

SENTENCE_STARTS = """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr. Ms.
    Now Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet
    You
""".split()
"""After "A. " or "U.S. " one of these (and a blank) shows that the dot ended a sentence."""

ASSIMILATED = (("can", "not"), ("gon", "na"), ("got", "ta"), ("wan", "na"), ("lem", "me"), ("gim", "me"))
"""Two words written as one."""

APOSTROPHE_INSIDE = """
    c'est c'mon cap'n d'ye e'er ev'ry li'l nat'l nor'easter s'mores
""".split()
APOSTROPHE_FIRST = "'cause 'em 'n 'n' 'til 'till".split()
APOSTROPHE_LAST = "dunkin' ol' somethin'".split()

FILE_ENDINGS = """
    bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps py
    sql tar txt wav x xml zip
""".split()
