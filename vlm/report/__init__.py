"""Pages, charts and tables that load nothing from elsewhere."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "write_report": "sections",
    "breakdown": "scores",
    "Links": "scores",
    "Curve": "charts",
    "Dot": "charts",
    "Scatter": "charts",
    "Curves": "sections",
    "Figure": "sections",
    "Gallery": "sections",
    "GalleryItem": "sections",
    "Hit": "hits",
    "Hits": "hits",
    "Small": "pictures",
    "search_page": "live",
    "small": "pictures",
    "Score": "scores",
    "Scores": "scores",
    "Stat": "scores",
    "Stats": "scores",
    "Table": "scores",
    "Text": "scores",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.report.charts import Curve as Curve
    from vlm.report.charts import Dot as Dot
    from vlm.report.charts import Scatter as Scatter
    from vlm.report.hits import Hit as Hit
    from vlm.report.hits import Hits as Hits
    from vlm.report.live import search_page as search_page
    from vlm.report.pictures import Small as Small
    from vlm.report.pictures import small as small
    from vlm.report.scores import Links as Links
    from vlm.report.scores import Score as Score
    from vlm.report.scores import Scores as Scores
    from vlm.report.scores import Stat as Stat
    from vlm.report.scores import Stats as Stats
    from vlm.report.scores import Table as Table
    from vlm.report.scores import Text as Text
    from vlm.report.scores import breakdown as breakdown
    from vlm.report.sections import Curves as Curves
    from vlm.report.sections import Figure as Figure
    from vlm.report.sections import Gallery as Gallery
    from vlm.report.sections import GalleryItem as GalleryItem
    from vlm.report.sections import write_report as write_report

__getattr__, __dir__ = door(__name__, _HOMES)
