package state

import (
	"fmt"
	"slices"
	"strings"
)

// Info is what a program says about one of its schemas before an upgrade.
type Info struct {
	Name     string   `cbor:"1,keyasint" json:"name"`
	Writes   uint32   `cbor:"2,keyasint" json:"writes"`
	Restores []uint32 `cbor:"3,keyasint" json:"restores"` // ascending, Writes included
}

// IncompatibleError lists the schemas that one generation writes and the other one
// cannot restore.
type IncompatibleError struct {
	Schemas []Incompatible
}

// Incompatible is one schema of an [IncompatibleError].
type Incompatible struct {
	Name       string
	Writes     uint32   // what the old generation writes
	CanRestore []uint32 // what the new one restores; empty when it does not know the schema
}

func (e *IncompatibleError) Error() string {
	var b strings.Builder
	b.WriteString("the new generation cannot restore what the old one writes: ")
	for i, s := range e.Schemas {
		if i > 0 {
			b.WriteString("; ")
		}
		if len(s.CanRestore) == 0 {
			fmt.Fprintf(&b, "schema %q (version %d) is unknown to it", s.Name, s.Writes)
			continue
		}
		fmt.Fprintf(&b, "schema %q has version %d, it restores %s", s.Name, s.Writes, versions(s.CanRestore))
	}
	b.WriteString("; build the new generation with the migrations that are missing, or drain the old one instead of moving its sessions")
	return b.String()
}

// Compatible reports whether a program that announced newer can restore everything
// that one that announced older writes: nil, or an *IncompatibleError with every
// schema it cannot. An upgrade needs Compatible(old, new); one that may have to give
// sessions back after the new generation served them needs Compatible(new, old) too.
//
// Neither list is trusted: order and repetitions do not matter, and an entry that
// writes version 0 is never compatible.
func Compatible(older, newer []Info) error {
	restores := make(map[string][]uint32, len(newer))
	for _, n := range newer {
		restores[n.Name] = append(restores[n.Name], n.Restores...)
	}
	var bad []Incompatible
	for _, o := range older {
		can := restores[o.Name]
		if o.Writes != 0 && slices.Contains(can, o.Writes) {
			continue
		}
		can = slices.Clone(can)
		slices.Sort(can)
		bad = append(bad, Incompatible{Name: o.Name, Writes: o.Writes, CanRestore: slices.Compact(can)})
	}
	if len(bad) == 0 {
		return nil
	}
	slices.SortFunc(bad, func(a, b Incompatible) int { return strings.Compare(a.Name, b.Name) })
	return &IncompatibleError{Schemas: bad}
}

// versions writes ascending version numbers for people: "version 3", "versions 1 to
// 4", "versions 1, 2, 5 to 7". At most 8 ranges are written out.
func versions(v []uint32) string {
	if len(v) == 0 {
		return "no version"
	}
	var parts []string
	for i := 0; i < len(v); {
		j := i
		for j+1 < len(v) && v[j+1] == v[j]+1 {
			j++
		}
		if len(parts) == 8 {
			parts = append(parts, "…")
			break
		}
		switch {
		case j == i:
			parts = append(parts, fmt.Sprint(v[i]))
		case j == i+1:
			parts = append(parts, fmt.Sprint(v[i]), fmt.Sprint(v[j]))
		default:
			parts = append(parts, fmt.Sprintf("%d to %d", v[i], v[j]))
		}
		i = j + 1
	}
	word := "versions "
	if len(v) == 1 {
		word = "version "
	}
	return word + strings.Join(parts, ", ")
}
