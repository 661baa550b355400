package main

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ktlsvisor/ktlsvisor/state"
)

var update = flag.Bool("update", false, "write testdata of versions that have none yet")

func mustSchemas(t *testing.T, version string) *schemas {
	t.Helper()
	s, err := newSchemas(version)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// What a release wrote must be restored by every later one, for ever: the files
// are never written again.
func TestGoldenStates(t *testing.T) {
	v1 := saved{Nick: "zoë", Room: "ops", Joined: true, Half: []byte("half a l\xc3")}
	v2 := v1
	v2.Away = "lunch"
	tests := []struct {
		file    string
		write   string // the release that wrote it
		value   saved
		restore []string // the releases that must restore it
	}{
		{"member-v1.golden", "1", v1, []string{"1", "2"}},
		{"member-v2.golden", "2", v2, []string{"2"}},
	}
	for _, tt := range tests {
		path := filepath.Join("testdata", tt.file)
		if _, err := os.Stat(path); *update && errors.Is(err, os.ErrNotExist) {
			b, err := mustSchemas(t, tt.write).member.Encode(tt.value)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatalf("%v; a new version gets its file with -update", err)
		}
		for _, version := range tt.restore {
			got, err := mustSchemas(t, version).member.Decode(b)
			if err != nil {
				t.Errorf("%s in release %s: %v", tt.file, version, err)
				continue
			}
			if diff := cmp.Diff(tt.value, got); diff != "" {
				t.Errorf("%s in release %s (-want +got):\n%s", tt.file, version, diff)
			}
		}
		now, err := mustSchemas(t, tt.write).member.Encode(tt.value)
		if err != nil || string(now) != string(b) {
			t.Errorf("release %s writes something else than %s now, %v", tt.write, tt.file, err)
		}
	}
}

// An upgrade is offered, a way back is refused before a session is touched.
func TestReleases(t *testing.T) {
	one, two := mustSchemas(t, "1"), mustSchemas(t, "2")
	if err := state.Compatible(one.infos(), two.infos()); err != nil {
		t.Errorf("upgrade: %v", err)
	}
	if err := state.Compatible(two.infos(), one.infos()); err == nil {
		t.Error("release 1 is said to restore what release 2 writes")
	}
	b, err := two.member.Encode(saved{Nick: "a"})
	if err != nil {
		t.Fatal(err)
	}
	var ve *state.VersionError
	if _, err := one.member.Decode(b); !errors.As(err, &ve) {
		t.Errorf("release 1 restored a state of release 2: %v", err)
	}
	if _, err := newSchemas("3"); err == nil {
		t.Error("there is a release 3")
	}
}
