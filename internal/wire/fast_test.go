package wire

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
)

// set gives v a value that has an encoding; all of its fields if it is a struct.
func set(v reflect.Value, step int) {
	switch v.Kind() {
	case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(1 << (step % (v.Type().Bits() - 1)))
	case reflect.Int, reflect.Int64:
		v.SetInt(1 << (step % 31))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.String:
		v.SetString(strings.Repeat("é", 1+step))
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		set(v.Elem(), step)
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			v.SetBytes(bytes.Repeat([]byte{byte(step)}, 1+step*step*step))
			return
		}
		v.Set(reflect.MakeSlice(v.Type(), 1+step, 1+step))
		for i := range v.Len() {
			set(v.Index(i), step)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if tag := v.Type().Field(i).Tag.Get("cbor"); tag != "-" {
				set(v.Field(i), step)
			}
		}
	default:
		panic(v.Kind())
	}
}

// The codec for moves writes what the general one writes, whatever fields are set, and
// reads the same from it. A field that it does not know is one that it leaves alone.
func TestFastCodec(t *testing.T) {
	check := func(what string, m *Message) (fast bool) {
		t.Helper()
		want, err := encMode.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		got, ok := appendMessage(nil, m)
		if ok && !bytes.Equal(got, want) {
			t.Errorf("%s:\n%x\nwant\n%x", what, got, want)
		}
		slow := new(Message)
		if err := decMode.Unmarshal(want, slow); err != nil {
			t.Fatal(err)
		}
		read := decodeMessage(want)
		if read != nil && !reflect.DeepEqual(read, slow) {
			t.Errorf("%s:\n%+v\nwant\n%+v", what, read, slow)
		}
		if ok && read == nil {
			t.Errorf("%s: does not read what it writes", what)
		}
		return ok
	}
	known := map[string]bool{"Type": true, "Items": true, "Refs": true, "Last": true, "Group": true}
	for typ := range typeNames {
		for step := range 12 {
			for i := range reflect.TypeFor[Message]().NumField() {
				name := reflect.TypeFor[Message]().Field(i).Name
				if reflect.TypeFor[Message]().Field(i).Tag.Get("cbor") == "-" {
					continue // a descriptor
				}
				m := &Message{Type: typ}
				if name != "Type" {
					set(reflect.ValueOf(m).Elem().Field(i), step)
				}
				if fast := check(typ.String()+" with "+name, m); fast && !known[name] {
					t.Errorf("%s with %s: a field that it does not know", typ, name)
				}
			}
			for i := range reflect.TypeFor[Item]().NumField() {
				f := reflect.TypeFor[Item]().Field(i)
				if f.Tag.Get("cbor") == "-" {
					continue
				}
				m := &Message{Type: typ, Items: make([]Item, 2)}
				set(reflect.ValueOf(&m.Items[1]).Elem().Field(i), step)
				check(typ.String()+" with an item with "+f.Name, m)
			}
		}
	}
	if !check("FREEZE", &Message{Type: TypeFreeze, Refs: []Ref{{ID: 1, Epoch: 1 << 40}}}) {
		t.Error("left to the general encoder")
	}
}

// FuzzFastDecode: what the codec for moves takes, the general one takes, and they make the
// same of it.
func FuzzFastDecode(f *testing.F) {
	for _, m := range samples() {
		b, err := Encode(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m := decodeMessage(b)
		if m == nil {
			return
		}
		var slow Message
		if err := decMode.Unmarshal(b, &slow); err != nil || !reflect.DeepEqual(m, &slow) {
			t.Errorf("%x: %+v\nwant %+v, %v", b, m, slow, err)
		}
	})
}
