package bench

import (
	"crypto/tls"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// One short turn of everything: the measurements work and their report can be read.
func TestReport(t *testing.T) {
	var results []Comparison
	for _, v := range []uint16{tls.VersionTLS13, tls.VersionTLS12} {
		for _, m := range []func() (Comparison, error){
			func() (Comparison, error) { return Bulk(v, 16<<10, 1<<20, 1) },
			func() (Comparison, error) { return PingPong(v, 20, 1) },
			func() (Comparison, error) { return Handshake(v, 2, 1) },
		} {
			c, err := m()
			if err != nil {
				t.Fatal(err)
			}
			if c.Speed <= 0 || c.CPU <= 0 || c.OursRate <= 0 || c.StockRate <= 0 {
				t.Errorf("%s: %+v", c.Name, c)
			}
			results = append(results, c)
		}
	}
	dir := t.TempDir()
	if err := NewReport(results).Write(dir); err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(read(t, dir, "results.json"), &back); err != nil || len(back.Results) != len(results) {
		t.Errorf("results.json: %d results, %v", len(back.Results), err)
	}
	table := string(read(t, dir, "README.md"))
	for _, c := range results {
		if !strings.Contains(table, "| "+c.Name+" |") {
			t.Errorf("README.md says nothing of %q", c.Name)
		}
	}
	for _, name := range []string{"speed.svg", "cpu.svg"} {
		for d := xml.NewDecoder(strings.NewReader(string(read(t, dir, name)))); ; {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
	}
	if host, err := os.Hostname(); err == nil && len(host) > 3 && strings.Contains(table, host) {
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
