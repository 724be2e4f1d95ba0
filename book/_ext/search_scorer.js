// A page with a heading that holds every word of the query comes first, and the hit
// leads to that section. Sphinx alone ranks pages by words and leads to their top.
Scorer.score = (result) => {
  const query = new URLSearchParams(window.location.search).get("q") || "";
  const words = query.toLowerCase().split(/[^\p{L}\p{N}]+/u).filter(Boolean);
  const [docname, , anchor, , score] = result;
  if (!words.length || anchor) return score;
  const page = Search._index.docnames.indexOf(docname);
  for (const [title, places] of Object.entries(Search._index.alltitles)) {
    const inTitle = title.toLowerCase();
    if (!words.every((word) => inTitle.includes(word))) continue;
    const place = places.find(([document]) => document === page);
    if (!place) continue;
    if (place[1]) {
      result[1] = `${Search._index.titles[page]} > ${title}`;
      result[2] = `#${place[1]}`;
    }
    return score + 200;
  }
  return score;
};
