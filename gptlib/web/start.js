// One line for a browser that cannot run the page. Written for old browsers too.
window.addEventListener("load", function () {
  var missing = [], places = document.querySelectorAll(".gpt-page"), i, line;
  if (!window.Float32Array) missing.push("typed arrays");
  if (!window.TextEncoder) missing.push("TextEncoder");
  if (!window.Promise) missing.push("promises");
  try {
    new RegExp("\\p{L}", "u");
  } catch (error) {
    missing.push("classes of characters in regular expressions");
  }
  if (!missing.length && window.gptPage && window.gptView) return;
  if (!missing.length) missing.push("newer JavaScript");
  for (i = 0; i < places.length; i++) {
    line = document.createElement("p");
    line.className = "gpt-error";
    line.textContent = "This browser cannot run the model. It lacks: " + missing.join(", ") + ".";
    places[i].insertBefore(line, places[i].firstChild);
  }
});
