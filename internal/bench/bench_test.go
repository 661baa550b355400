package bench

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest"
)

func TestMain(m *testing.M) {
	Main()
	os.Exit(m.Run())
}

// One short turn of everything: the measurements work and their report can be read.
func TestReport(t *testing.T) {
	var r Report
	for _, c := range SoftwareCases() {
		got, err := c.Measure(Tiny)
		if err != nil {
			t.Fatal(err)
		}
		if got.Speed.Median <= 0 || got.CPU.Median <= 0 || got.OursRate <= 0 || got.StockRate <= 0 || got.ID != c.ID {
			t.Errorf("%s: %+v", c.ID, got)
		}
		r.Results = append(r.Results, got)
	}
	r.Idle = []Idle{{ID: "idle-software", Layer: "software", Few: 1, Many: 2, Ours: Slope{PerSession: 5}, Stock: &Slope{PerSession: 30}, Run: thisRun()}}
	dir := t.TempDir()
	if err := r.Write(dir); err != nil {
		t.Fatal(err)
	}
	back, err := ReadReport(dir)
	if err != nil || len(back.Results) != len(r.Results) || len(back.Idle) != 1 {
		t.Errorf("results.json: %d results, %v", len(back.Results), err)
	}
	text := string(read(t, dir, "README.md"))
	for _, c := range r.Results {
		if !strings.Contains(text, "| "+c.Name+": ") {
			t.Errorf("README.md says nothing of %q", c.Name)
		}
	}
	for _, name := range []string{"speed.svg", "cpu.svg", "idle.svg"} {
		for d := xml.NewDecoder(strings.NewReader(string(read(t, dir, name)))); ; {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
	}
	if host, err := os.Hostname(); err == nil && len(host) > 3 && strings.Contains(text, host) {
		t.Error("README.md names this host")
	}
}

func read(t *testing.T, dir, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A run of a part replaces that part, of its guest, and nothing else.
func TestAdd(t *testing.T) {
	on := func(guest, id string, speed float64) Comparison {
		return Comparison{ID: id, Layer: "kernel", Speed: Ratio{Median: speed}, Run: Run{Guest: guest}}
	}
	r := Report{Results: []Comparison{on("7", "a", 1), on("6.12", "a", 2), on("7", "b", 3)}}
	r.Add(Report{Results: []Comparison{on("7", "a", 4), on("7", "c", 5)}})
	want := []Comparison{on("7", "a", 4), on("6.12", "a", 2), on("7", "b", 3), on("7", "c", 5)}
	if !slices.Equal(r.Results, want) {
		t.Errorf("%+v, want %+v", r.Results, want)
	}
}

// What a guest prints comes back as it was, whatever the log puts before it.
func TestFromGuest(t *testing.T) {
	want := Report{Results: []Comparison{{ID: "x", Name: "a \"name\"", Layer: "kernel"}}, Idle: []Idle{{ID: "idle-kernel"}}}
	line, err := guestLine(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := fromGuest(&vmtest.BootResult{Packages: []vmtest.PackageResult{{Output: []string{"noise", "    guest_test.go:52: " + line}}}})
	a, _ := json.Marshal(want)
	b, _ := json.Marshal(got)
	if err != nil || string(a) != string(b) {
		t.Errorf("%s (error %v), want %s", b, err, a)
	}
}

// docs/benchmarks and the README show what results.json says.
func TestCommittedFigures(t *testing.T) {
	dir := filepath.Join("..", "..", "docs", "benchmarks")
	r, err := ReadReport(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Results) == 0 {
		t.Fatal("docs/benchmarks has no figures: run make bench")
	}
	if string(read(t, dir, "README.md")) != r.markdown() {
		t.Error("docs/benchmarks/README.md differs from results.json: run make bench BENCH_RUN=none")
	}
	if !strings.Contains(string(read(t, filepath.Join("..", ".."), "README.md")), r.quote()) {
		t.Error("the figures in README.md are not those of results.json: run make bench BENCH_RUN=none")
	}
}

func TestQuantile(t *testing.T) {
	for _, tc := range []struct {
		v       []float64
		q, want float64
	}{
		{[]float64{3}, .5, 3},
		{[]float64{3, 1, 2}, .5, 2},
		{[]float64{4, 1, 2, 3}, .5, 2.5},
		{[]float64{5, 4, 3, 2, 1}, .25, 2},
	} {
		if got := quantile(tc.v, tc.q); got != tc.want {
			t.Errorf("quantile %g of %v is %g, expected %g", tc.q, tc.v, got, tc.want)
		}
	}
}

// The bounds are those of tables of the sign test.
func TestOutside(t *testing.T) {
	for n, want := range map[int]int{1: 0, 5: 0, 6: 0, 9: 1, 11: 1, 20: 5, 31: 9} {
		if got := outside(n); got != want {
			t.Errorf("outside(%d) is %d, want %d", n, got, want)
		}
	}
}

func TestRollup(t *testing.T) {
	kib, ok := rollup([]byte("00400000-7ffd [rollup]\nRss:   10 kB\nPss:                1234 kB\nPss_Dirty:  5 kB\n"), "Pss:")
	if !ok || kib != 1234 {
		t.Errorf("%g, %v", kib, ok)
	}
}
