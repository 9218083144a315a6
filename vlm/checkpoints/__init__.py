"""Model directories: open and write them, whole or part by part. Weights are safetensors only."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    **dict.fromkeys(("in_geometry", "load", "open_model"), "directory"),
    "save": "saving",
    **dict.fromkeys(("big_vision", "big_vision_configs", "digests", "identity", "manifest", "names"), ""),
    **dict.fromkeys(("EMBEDDING", "text_config", "vision_config"), "big_vision_configs"),
    "to_array": "big_vision_names",
    **dict.fromkeys(("NOTES", "check_numbers", "guarded"), "checks"),
    **dict.fromkeys(("WINDOW_IN_USE", "own_config", "paligemma_config"), "configs"),
    "of_values": "digests",
    **dict.fromkeys(("INDEX", "SINGLE", "check_regular", "is_plain", "read_json"), "files"),
    "with_geometry": "geometry",
    **dict.fromkeys(("Tower", "change_tower", "planned", "read_as", "set_image_size"), "geometry_plan"),
    "of_checkpoint": "identity",
    "of_model": "identity",
    **dict.fromkeys(
        ("OWN_TRANSFORM", "change_transform", "check_settings", "known_settings", "recorded"), "image_settings"
    ),
    "load_model": "loader",
    **dict.fromkeys(("HEAD", "to_hub", "to_live"), "names"),
    "Opening": "opening",
    "check_pair": "pairs",
    "load_decoder": "parts",
    "load_tower": "parts",
    "Placement": "placement",
    "HUB_FILES": "places",
    "locate": "places",
    **dict.fromkeys(("checked_image_settings", "open_tokenizer", "own_transform", "resample_name"), "preprocessing"),
    **dict.fromkeys(("check_size", "recorded_transform", "written_transform"), "recorded"),
    **dict.fromkeys(("widest", "write_shards"), "shards"),
    **dict.fromkeys(("FLOATS", "Source", "expected_shapes", "place"), "source"),
    "seeded": "streams",
    **dict.fromkeys(("fitting", "head_of", "needed"), "tower_head"),
    "has_two_towers": "two_towers",
    "Weights": "weights",
    "read_header": "weights",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.checkpoints import big_vision as big_vision
    from vlm.checkpoints import big_vision_configs as big_vision_configs
    from vlm.checkpoints import digests as digests
    from vlm.checkpoints import identity as identity
    from vlm.checkpoints import manifest as manifest
    from vlm.checkpoints import names as names
    from vlm.checkpoints.big_vision_configs import EMBEDDING as EMBEDDING
    from vlm.checkpoints.big_vision_configs import text_config as text_config
    from vlm.checkpoints.big_vision_configs import vision_config as vision_config
    from vlm.checkpoints.big_vision_names import to_array as to_array
    from vlm.checkpoints.checks import NOTES as NOTES
    from vlm.checkpoints.checks import check_numbers as check_numbers
    from vlm.checkpoints.checks import guarded as guarded
    from vlm.checkpoints.configs import WINDOW_IN_USE as WINDOW_IN_USE
    from vlm.checkpoints.configs import own_config as own_config
    from vlm.checkpoints.configs import paligemma_config as paligemma_config
    from vlm.checkpoints.digests import of_values as of_values
    from vlm.checkpoints.directory import in_geometry as in_geometry
    from vlm.checkpoints.directory import load as load
    from vlm.checkpoints.directory import open_model as open_model
    from vlm.checkpoints.files import INDEX as INDEX
    from vlm.checkpoints.files import SINGLE as SINGLE
    from vlm.checkpoints.files import check_regular as check_regular
    from vlm.checkpoints.files import is_plain as is_plain
    from vlm.checkpoints.files import read_json as read_json
    from vlm.checkpoints.geometry import with_geometry as with_geometry
    from vlm.checkpoints.geometry_plan import Tower as Tower
    from vlm.checkpoints.geometry_plan import change_tower as change_tower
    from vlm.checkpoints.geometry_plan import planned as planned
    from vlm.checkpoints.geometry_plan import read_as as read_as
    from vlm.checkpoints.geometry_plan import set_image_size as set_image_size
    from vlm.checkpoints.identity import of_checkpoint as of_checkpoint
    from vlm.checkpoints.identity import of_model as of_model
    from vlm.checkpoints.image_settings import OWN_TRANSFORM as OWN_TRANSFORM
    from vlm.checkpoints.image_settings import change_transform as change_transform
    from vlm.checkpoints.image_settings import check_settings as check_settings
    from vlm.checkpoints.image_settings import known_settings as known_settings
    from vlm.checkpoints.image_settings import recorded as recorded
    from vlm.checkpoints.loader import load_model as load_model
    from vlm.checkpoints.names import HEAD as HEAD
    from vlm.checkpoints.names import to_hub as to_hub
    from vlm.checkpoints.names import to_live as to_live
    from vlm.checkpoints.opening import Opening as Opening
    from vlm.checkpoints.pairs import check_pair as check_pair
    from vlm.checkpoints.parts import load_decoder as load_decoder
    from vlm.checkpoints.parts import load_tower as load_tower
    from vlm.checkpoints.placement import Placement as Placement
    from vlm.checkpoints.places import HUB_FILES as HUB_FILES
    from vlm.checkpoints.places import locate as locate
    from vlm.checkpoints.preprocessing import checked_image_settings as checked_image_settings
    from vlm.checkpoints.preprocessing import open_tokenizer as open_tokenizer
    from vlm.checkpoints.preprocessing import own_transform as own_transform
    from vlm.checkpoints.preprocessing import resample_name as resample_name
    from vlm.checkpoints.recorded import check_size as check_size
    from vlm.checkpoints.recorded import recorded_transform as recorded_transform
    from vlm.checkpoints.recorded import written_transform as written_transform
    from vlm.checkpoints.saving import save as save
    from vlm.checkpoints.shards import widest as widest
    from vlm.checkpoints.shards import write_shards as write_shards
    from vlm.checkpoints.source import FLOATS as FLOATS
    from vlm.checkpoints.source import Source as Source
    from vlm.checkpoints.source import expected_shapes as expected_shapes
    from vlm.checkpoints.source import place as place
    from vlm.checkpoints.streams import seeded as seeded
    from vlm.checkpoints.tower_head import fitting as fitting
    from vlm.checkpoints.tower_head import head_of as head_of
    from vlm.checkpoints.tower_head import needed as needed
    from vlm.checkpoints.two_towers import has_two_towers as has_two_towers
    from vlm.checkpoints.weights import Weights as Weights
    from vlm.checkpoints.weights import read_header as read_header

__getattr__, __dir__ = door(__name__, _HOMES)
