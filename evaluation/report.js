const form = document.querySelector("form"), shown = document.getElementById("shown");
const rows = [...document.querySelectorAll("article")].map((element) => ({
  element, text: element.textContent.toLowerCase(), group: element.dataset.group,
  wrong: element.dataset.wrong === "yes",
}));
function filter() {
  const { search, group, wrong } = form.elements, text = search.value.trim().toLowerCase();
  let count = 0;
  for (const row of rows) {
    const fits = row.text.includes(text) && (!wrong.checked || row.wrong) && ["", row.group].includes(group.value);
    row.element.hidden = !fits;
    count += fits;
  }
  shown.textContent = `${count} of ${rows.length} rows match.`;
}
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("play", (event) => {  // one clip at a time
  for (const other of document.querySelectorAll("audio")) if (other !== event.target) other.pause();
}, true);
form.hidden = false;
filter();
